"""The paper's tables: which runs they have, and the page that fills itself."""

import json

import pytest
from paper.page import MODELS, PAGE, command, page, rows
from typer.testing import CliRunner

from fastmmoe.families import ARCHITECTURES
from fastmmoe.harnesses.paper import TABLES
from fastmmoe.methods import FastMMoEConfig
from fastmmoe_cli.app import app


@pytest.mark.parametrize("model", MODELS)
def test_runs(model):
    shape = ARCHITECTURES[model]
    preset = FastMMoEConfig.preset(model, retention=0.5)
    found = {name: table.configs(model, shape) for name, table in TABLES.items()}
    for configs in found.values():
        assert next(iter(configs.items())) == ("dense", None)
        assert all(config is not None for config in list(configs.values())[1:])
        for config in list(configs.values())[1:]:
            config.check_model(shape.num_hidden_layers, shape.num_experts_per_tok)
    assert found["retention"]["FastMMoE, 0.5"] == found["latency"]["FastMMoE, 0.5"] == preset
    names = ("FastMMoE", "FastV", "SparseVLM", "uniform", "random")
    assert set(found["retention"]) == {"dense", "fewer experts only"} | {
        f"{name}, {retention}" for name in names for retention in (0.75, 0.5, 0.25)
    }
    grid = {(one.reduction_layer, one.vision_top_k) for one in found["experts"].values() if one}
    assert (2, preset.vision_top_k) in grid and len(grid) == len(found["experts"]) - 1 >= 15


def test_the_committed_page_is_what_the_files_make():
    assert PAGE.read_text() == page(), "docs/results/paper.md: run bench/paper/page.py"


def test_a_page_fills_itself(tmp_path):
    table = TABLES["retention"]

    def run(name: str, score: float, other: float | None, costs: dict) -> dict:
        return {"name": name, "config": None, "costs": costs, "n": {"A": 2, "B": 2},
                "scores": {"A": {"acc": score, "x": 3.0}, "B": {"Overall": other}}}  # fmt: skip

    costs = [
        {"flops_ratio": ratio, "first_token_latency_s": seconds, "answered": 2}
        for ratio, seconds in ((1.0, 0.2), (0.43, 0.1))
    ]
    runs = [run("dense", 0.8, 50.0, costs[0]), run("FastMMoE, 0.5", 0.6, 25.0, costs[1]), run("mine", 0.4, None, {})]
    head, *found = rows(table, ["dense", "FastMMoE, 0.5", "FastV, 0.5"], {"rows": runs})
    assert head == ["run", "A acc", "B Overall", "retained", "FLOPs", "first token"]
    assert found == [
        ["dense", "0.8", "50", "100.0%", "1.00", "200.0 ms (1.00)"],
        ["FastMMoE, 0.5", "0.6", "25", "62.5%", "0.43", "100.0 ms (0.50)"],
        ["FastV, 0.5", "", "", "", "", ""],
        ["mine", "0.4", "", "", "", ""],
    ]
    runs[1]["costs"]["answered"] = 200  # after a stop: others were asked, and their times are not like the dense run's
    assert rows(table, [], {"rows": runs})[2][-1] == "100.0 ms"
    with pytest.raises(ValueError, match="expected a run named 'dense', got mine"):
        rows(table, [], {"rows": runs[2:]})
    # in its place on the page, with where and when it ran
    folder = tmp_path / "deepseek-vl2" / "retention"
    folder.mkdir(parents=True)
    about = {"machine": {"gpu": "H0", "cpu": "c"}, "versions": {"torch": "9"}, "date": "2030-01-02", "rows": runs}
    (folder / "eval.json").write_text(json.dumps(about))
    text = page(tmp_path)
    assert "| FastMMoE, 0.5 | 0.6 | 25 | 62.5% |" in text and "H0, torch 9, 2030-01-02" in text
    assert text.count("62.5%") == 1 and text.index("62.5%") > text.index("## deepseek-vl2")


def test_commands_are_what_eval_takes(tmp_path):
    """All but for the checkpoint, which is not here."""
    for name, table in TABLES.items():
        words = command("deepseek-vl2", name, table).split()
        assert words[:3] == ["fastmmoe", "eval", "--table"]
        missing = tmp_path / "none"
        words[words.index("--model") + 1] = str(missing)
        words[words.index("--device") + 1], words[words.index("--out") + 1] = "cpu", str(tmp_path / "out")
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 2 and ("--model" in result.output or "lmms-eval" in result.output)


def test_a_table_says_what_is_run(tmp_path):
    words = ["eval", "--table", "retention", "--retention", "0.5", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "--table: says what is run" in result.output
    assert not (tmp_path / "out").exists()


def test_a_file_of_settings_takes_no_other_runs_name(tmp_path):
    path = tmp_path / "dense.json"
    path.write_text('{"vision_top_k": 2}')
    words = ["eval", "--harness", "vlmevalkit", "--data", "x", "--config", str(path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "a run is called 'dense' already" in result.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()
