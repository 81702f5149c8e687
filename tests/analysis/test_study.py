"""The study end to end at tiny size: files that agree with each other, resuming, times, and refusals by the CLI."""

import csv
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model.methods import skipping
from PIL import Image
from typer.testing import CliRunner

import fastmmoe
from fastmmoe.study import methods, plots, tables
from fastmmoe.study.accuracy import evaluate
from fastmmoe.study.plots import draw_plots
from fastmmoe.study.prompts import encode, make_batches
from fastmmoe.study.results import PartFile, read_parts, write_whole
from fastmmoe.study.study import PARTS, Study, choose, session_of
from fastmmoe.study.timing import prefill_times
from fastmmoe_cli.app import app


@pytest.fixture
def small(monkeypatch):
    """One retention, one ablation: the grids' shape is another test's."""
    monkeypatch.setattr(methods, "RETENTIONS", (0.5,))
    monkeypatch.setattr(methods, "ABLATION_RETENTIONS", (0.25,))
    factors = {"alpha": ({"alpha": 0.0}, {"alpha": 1.0})}
    monkeypatch.setattr(methods, "FACTORS", factors)
    monkeypatch.setattr("fastmmoe.study.plots.FACTORS", factors)


def invoke(*arguments):
    return CliRunner().invoke(app, ["analyze", *map(str, arguments)])


def refused(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.stdout == "", result.output
    return result.stderr


def test_study_end_to_end(small, settings, tmp_path):
    Study(settings, tmp_path, list(PARTS)).run()
    parts = read_parts(tmp_path, PARTS)
    assert list(parts) == list(PARTS)
    rows = parts["methods"]["rows"]
    assert [row["method"] for row in rows[:2]] == ["dense", "FastMMoE"]
    assert rows[0]["flops_ratio"] == 1.0 and all(row["flops_ratio"] < 1 for row in rows[1:])
    assert {row["split"] for row in rows} == {"test"} and {row["n"] for row in rows} == {14}
    assert {row["split"] for row in parts["ablations"]["rows"]} == {"dev"}
    assert parts["methods"]["study"]["model"]["layers"] == 5 and "one training seed" in parts["methods"]["notes"][0]

    with (tmp_path / "methods.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in table] == pytest.approx([row["accuracy"] for row in rows], abs=1e-5)
    assert "right" not in table[0]

    # timed and evaluated alike, and as expensive
    by_key = {methods.key_of(row): row for row in rows}
    for row in parts["timing"]["rows"]:
        assert row["seconds"] > 0 and row["rounds"] == 2 and row["batch"] == 3
        assert row["flops_ratio"] == pytest.approx(by_key[methods.key_of(row)]["flops_ratio"], abs=0.02)
    assert parts["timing"]["rows"][0]["time_ratio"] == 1.0

    written = [*tables.write_tables(tmp_path), *draw_plots(tmp_path)]
    assert {path.name for path in written} == {
        "comparisons.csv", "tables.md", *(f"{name}.png" for name in (set(PARTS) - {"chosen"}) | {"types"})
    }  # fmt: skip
    for path in written:
        if path.suffix == ".png":
            assert Image.open(path).size[0] > 500
    text = (tmp_path / "tables.md").read_text()
    assert all(f"## {part}" in text for part in set(PARTS) - {"timing"}) and "± 0." in text


def test_resume_adds_what_is_missing(small, settings, tmp_path):
    Study(settings, tmp_path, ["methods"]).run()
    path = tmp_path / "methods.json"
    whole = json.loads(path.read_text())
    marked = [dict(row, accuracy=-1.0) for row in whole["rows"][1:4]]
    path.write_text(json.dumps(whole | {"complete": False, "rows": marked}))
    Study(settings, tmp_path, ["methods"], resume=True).run()
    again = json.loads(path.read_text())
    assert again["complete"] and [row["method"] for row in again["rows"]] == [row["method"] for row in whole["rows"]]
    assert [row["accuracy"] == -1.0 for row in again["rows"]][:5] == [False, True, True, True, False]
    with pytest.raises(ValueError, match="rows of another study"):
        Study(replace(settings, seed=1), tmp_path, ["methods"], resume=True)
    Study(settings, tmp_path, ["methods"]).run()
    assert json.loads(path.read_text())["rows"] == whole["rows"]


def test_choose_takes_the_best_mean(settings):
    setting = session_of(settings).setting
    grid = [m for m in methods.ablation_grid(setting) if m.retention == 0.25 and m.name == "FastMMoE"]

    def row(method):
        alpha = method.config.alpha
        # best in one place, best in the mean
        accuracy = {0.0: 0.9 if method.placement == "early" else 0.1, 1.0: 0.6}.get(alpha, 0.5)
        return {"config": method.describe()["config"], "accuracy": accuracy}

    rows = [{"config": None, "accuracy": 1.0}, *map(row, grid)]
    assert choose(setting, rows) == {"alpha": 1.0}
    assert choose(setting, [dict(row, accuracy=0.5) for row in rows[1:]]) == {}


def test_comparisons_are_of_methods_that_prune_alike():
    def row(method, placement, top_k, right, config=1):
        return {
            "method": method, "placement": placement, "retention": 0.5 if placement else 1.0, "vision_top_k": top_k,
            "right": right, "flops_ratio": 0.5, "n": len(right), "config": config,
        }  # fmt: skip

    rows = [
        row("dense", "", None, "1111", None),
        row("FastMMoE", "early", None, "1101"),
        row("FastV", "early", None, "1000"),
        row("FastV", "half", None, "0000"),
        row("FastV", "early", 2, "0000"),
    ]
    found = {(r["method"], r["against"], r["placement"], r["vision_top_k"]): r for r in tables.comparisons(rows)}
    assert found["FastMMoE", "FastV", "early", None]["difference"] == pytest.approx(0.5)
    assert found["FastMMoE", "FastV", "early", None]["standard_error"] == pytest.approx((1 / 3 / 4) ** 0.5)
    assert found["FastMMoE", "dense", "early", None]["difference"] == pytest.approx(-0.25)
    assert ("FastV", "FastMMoE", "half", None) not in found and ("FastV", "FastMMoE", "early", 2) not in found


def test_times_are_of_the_prefill_alone(settings):
    session = session_of(settings)
    batch = session.questions("test")[1][0].first(2)
    shapes = []
    text = session.model.model.language_model
    handle = text.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["inputs_embeds"].shape), with_kwargs=True
    )
    try:
        rows = prefill_times(session.model, batch, [methods.dense(), methods.heatmap_grid(session.setting)[0]], 3)
    finally:
        handle.remove()
    assert shapes == [torch.Size([2, batch.layout.width, 32])] * 8
    assert [row["rounds"] for row in rows] == [3, 3]


def test_times_stand_beside_the_flops_that_ran(settings):
    """Experts that are skipped by need cost none; how many they are differs between prompts."""
    session = session_of(settings)
    examples, batches = session.questions("test")
    batch = next(batch for batch in batches if batch.attention_mask is not None)
    grid = [methods.dense(), methods.Method("x", configs=(skipping(5, prune_layers=(1,), retention=0.5),))]
    rows = prefill_times(session.model, batch, grid, 1)
    asked = [examples[number] for number in batch.numbers]
    alone = make_batches(encode(session.model, session.processor, asked), len(asked))
    expected = [
        evaluate(session.model, session.processor, asked, alone, method, max_new_tokens=1)["flops_ratio"]
        for method in grid
    ]
    assert [row["flops_ratio"] for row in rows] == pytest.approx(expected)
    bound = fastmmoe.flops(session.model, 8, 100, grid[1].config)
    assert expected[1] < 0.95 * bound.reduced / bound.dense


def test_cli_on_own_questions(small, checkpoint, tmp_path):
    lines = []
    for index in range(4):
        Image.new("RGB", (60, 40), (60 * index, 100, 50)).save(tmp_path / f"{index // 2}.png")
        lines.append({"image": f"{index // 2}.png", "question": "how many digits ?", "answer": "3"})
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "results"
    result = invoke(
        "--model", checkpoint, "--data", data, "--out", out, "--parts", "routing,methods", "--n", 3, "--json"
    )
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    figures = json.loads(result.stdout)["parts"]
    assert list(figures) == ["methods", "routing"] and {row["n"] for row in figures["methods"]} == {3}
    assert "right" not in figures["methods"][0] and (out / "methods.png").exists()


def test_cli_refuses(checkpoint, tmp_path):
    out = ("--model", checkpoint, "--out", tmp_path / "out")
    assert "unknown figures, expected some of methods" in refused(*out, "--parts", "figures")
    assert "chosen needs the ablations" in refused(*out, "--parts", "chosen")
    assert "no-such" in refused("--model", tmp_path / "no-such", "--out", tmp_path / "out")
    questions = tmp_path / "questions.jsonl"
    assert "cannot be read" in refused(*out, "--data", questions)
    questions.write_text('{"image": "a.png", "question": "?"}\n')
    assert "line 1: answer missing" in refused(*out, "--data", questions)
    assert "dev_data: none given, and ablations needs" in refused(*out, "--data", questions, "--parts", "ablations")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def questions(tmp_path):
    """A file of three questions, and (whole or not) pictures of theirs."""
    for name in ("whole", "other"):
        Image.effect_noise((60, 40), 50).convert("RGB").save(tmp_path / f"{name}.png")
    content = (tmp_path / "other.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])

    def write(**last):
        lines = [{"image": "whole.png", "question": "how many digits ?", "answer": "3"}] * 2
        path = tmp_path / "questions.jsonl"
        path.write_text("\n".join(map(json.dumps, [*lines, lines[0] | last])))
        return path

    return write


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ({"image": "half.png"}, "line 3: image {folder}/half.png: not an image"),
        ({"question": "<IMG_CONTEXT> ?"}, "line 3: holds <IMG_CONTEXT>"),
        ({"question": " "}, "line 3: expected a question"),
        ({"question": "\udcff"}, "line 3: expected question to be text in UTF-8"),
    ],
)
@pytest.mark.parametrize("option", ["--data", "--dev-data"])
def test_cli_refuses_questions_by_line(checkpoint, tmp_path, questions, last, says, option):
    """Also those that only a later part asks."""
    broken = questions(**last).rename(tmp_path / "broken.jsonl")
    data = [option, broken] if option == "--data" else ["--data", questions(), option, broken]
    parts = "methods" if option == "--data" else "methods,ablations"
    said = refused("--model", checkpoint, "--out", tmp_path / "out", *data, "--parts", parts)
    assert f"error: {broken}, {says.format(folder=tmp_path)}" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_cli_keeps_results(small, checkpoint, tmp_path, questions, monkeypatch):
    """An interrupt leaves the rows there are; they are overwritten, or gone on with, as the user says."""
    out, data = tmp_path / "out", questions()
    options = ["--model", checkpoint, "--out", out, "--data", data, "--parts", "routing,methods", "--n", 3]
    add = PartFile.add

    def add_and_interrupt(self, row):
        add(self, row)
        if len(self.rows) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    # a process of several test runners ignores it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(PartFile, "add", add_and_interrupt)
            assert invoke(*options).exit_code == 130
    finally:
        signal.signal(signal.SIGINT, before)
    path = out / "methods.json"
    assert len(json.loads(path.read_text())["rows"]) == 2 and [file.name for file in out.iterdir()] == ["methods.json"]
    before = path.read_bytes()
    said = refused(*options)
    assert "holds an earlier run's methods" in said and "--resume" in said and "--overwrite" in said
    assert "expected it or --resume" in refused(*options, "--resume", "--overwrite")

    # other settings, another model and other questions under the same name, by name
    assert "seed was 0 and is 5" in refused(*options, "--resume", "--seed", 5)
    data.write_text(data.read_text().replace("how many", "count the"))
    assert "data_sha256 was" in refused(*options, "--resume")
    data = questions()
    assert path.read_bytes() == before

    assert invoke(*options, "--resume").exit_code == 0
    whole = json.loads(path.read_text())
    assert whole["complete"] and whole["rows"][:2] == json.loads(before)["rows"]
    assert "holds an earlier run's" in refused(*options)
    damaged = ([1], [{}], [{**whole["rows"][1], "right": 5}], [{**whole["rows"][1], "config": {"type": "None"}}])
    for rows in damaged:
        path.write_text(json.dumps(whole | {"complete": False, "rows": rows}))
        assert f"{path}: row 0 is damaged" in refused(*options, "--resume")
    path.write_text("[]")
    assert f"{path}: no results of a study" in refused(*options, "--resume")
    # also where only the tables at the end would read it
    assert f"{path}: no results of a study" in refused(*options[:-4], "--parts", "routing", "--n", 3, "--overwrite")
    assert invoke(*options, "--overwrite").exit_code == 0
    assert len(json.loads(path.read_text())["rows"]) == len(whole["rows"])


def test_cli_tries_out_before_work(tmp_path):
    """No such checkpoint is there either: it would be refused next."""
    file = tmp_path / "file"
    file.touch()
    folder = tmp_path / "folder"
    (folder / "methods.png").mkdir(parents=True)
    for out in (file, file / "out", Path("/proc/out"), folder):
        said = refused("--model", tmp_path / "gone", "--out", out)
        assert said.startswith(f"error: --out {out}") and "cannot be written" in said
    assert [path.name for path in tmp_path.rglob("*")] == ["file", "folder", "methods.png"]


def test_cli_prints_figures_before_a_disk_is_full(checkpoint, tmp_path, questions):
    options = ["--model", checkpoint, "--data", questions(), "--parts", "routing", "--n", 3, "--json"]
    out = tmp_path / "out"
    out.mkdir()
    (out / "routing.png").symlink_to("/dev/full")
    result = invoke(*options, "--out", out)
    assert result.exit_code == 1 and json.loads(result.stdout)["parts"]["routing"]
    assert result.stderr.endswith(f"error: --out {out}: could not be written: No space left on device\n")
    (out / "routing.json.partial").symlink_to("/dev/full")
    result = invoke(*options, "--out", out, "--overwrite")
    assert result.exit_code == 1 and json.loads(result.stdout)["parts"]["routing"]
    assert "No space left on device; " in result.stderr and "--resume" in result.stderr
    assert json.loads((out / "routing.json").read_text())["complete"]


def test_rows_are_kept_where_their_csv_cannot_be_written(tmp_path):
    """Also those of a part that has them all at once."""
    (tmp_path / "timing.csv").mkdir()
    part = PartFile(tmp_path, "timing", {"study": {}}, False)
    with pytest.raises(OSError):
        part.finish([{"seconds": 1.0}])
    found = json.loads(part.path.read_text())
    assert found["rows"] == [{"seconds": 1.0}] and not found["complete"] and not part.is_complete


def test_results_leave_neighbours_and_links_alone(tmp_path):
    (tmp_path / "of.partial").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "of.json").symlink_to(tmp_path / "folder" / "there.json")
    write_whole(tmp_path / "of.json", {"a": 1})
    assert (tmp_path / "of.partial").read_text() == "mine"
    assert (tmp_path / "of.json").is_symlink() and json.loads((tmp_path / "of.json").read_text()) == {"a": 1}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "of.json", "of.partial", "there.json"]


def test_a_calibration_is_of_the_models_own(settings, tmp_path):
    path = tmp_path / "modes.json"
    config = skipping(special_tokens=())
    values = {"type": type(config).__name__, "config": config.to_dict()}
    own = session_of(settings).describe_model()["gates_sha256"]
    assert methods.read_calibration(_written(path, values), own) == config  # by hand: it does not say of which
    for gates in (own, "0" * 64):
        study = {"calibration": {"study": {"model": {"gates_sha256": gates}}}}
        _written(path, values | study)
        if gates == own:
            assert methods.read_calibration(path, own) == config
        else:
            with pytest.raises(ValueError, match="calibration: .*modes.json is of another model"):
                Study(replace(settings, calibration=path), tmp_path / "out", ["methods"])
    assert not (tmp_path / "out").exists()


def _written(path, values):
    path.write_text(json.dumps(values))
    return path


def test_budgets_of_an_older_study_are_drawn_without_times(tmp_path):
    """Rows from before there were calculated times."""
    row = {"accuracy": 0.9, "standard_error": 0.01}
    rows = [row, row | {"expert_budget": 4, "reduction_layer": 0}]
    figure = plots.budget_figure(rows)
    assert figure.axes[0].get_xticklabels()[0].get_text() == "0"


def test_cli_says_what_is_under_way_and_what_to_choose(small, checkpoint, tmp_path, questions):
    """Where no terminal shows a progress bar."""
    options = ["--parts", "routing,methods", "--n", 3]
    result = invoke("--model", checkpoint, "--data", questions(), "--out", tmp_path / "own", *options)
    assert result.exit_code == 0, result.output
    said = [f"note: {part}: {PARTS[part]}" for part in ("methods", "routing")]
    assert [line for line in result.stderr.splitlines() if line.startswith("note")] == said
    rows = json.loads((tmp_path / "own/methods.json").read_text())["rows"]
    found = [line for line in result.stdout.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in found]
    dense = rows[0]
    assert cells[0] == ["dense", "", "all", "all", f"{dense['accuracy']:.3f} ± {dense['standard_error']:.3f}", "1.00"]
    cheapest = min(rows, key=lambda row: (row["flops_ratio"], -row["accuracy"]))
    layers = ", ".join(map(str, cheapest["prune_layers"]))
    experts = f"{cheapest['vision_top_k']} from {cheapest['reduction_layer']}"
    assert (layers, f"{cheapest['retention']:g}", experts) in [tuple(row[1:4]) for row in cells]
    costs = {row[5]: row[4] for row in cells}
    assert costs[f"{cheapest['flops_ratio']:.2f}"].startswith(f"{cheapest['accuracy']:.3f} ±")
    assert all(str(tmp_path / "own" / f"{part}.json") in result.stdout for part in ("methods", "routing"))

    scenes = ("--model", checkpoint, "--out", tmp_path / "scenes", "--n", 4, "--dev-n", 3, "--parts")
    result = invoke(*scenes, "routing")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("note: works on generated scenes (4 questions); --data asks yours")
    assert "dense" not in result.stdout
    assert "note" not in invoke(*scenes, "routing", "--resume").stderr
    result = invoke(*scenes, "routing,ablations", "--resume")
    assert result.stderr.startswith("note: works on generated scenes (4 questions, 3 to choose by); --data asks yours")
