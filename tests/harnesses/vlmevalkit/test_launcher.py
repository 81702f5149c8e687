"""VLMEvalKit asks our model: answers are the study's, stopped runs go on, failures are no wrong answers."""

import base64
import json
import pickle
import subprocess
import sys

import pandas
import pytest
import torch

from fastmmoe import FastMMoEConfig
from fastmmoe.harnesses.answers import Answer, Answerer
from fastmmoe.harnesses.vlmevalkit import __main__ as launcher
from fastmmoe.methods.files import content_of
from fastmmoe.scenes import CHECKPOINT
from fastmmoe.study.accuracy import answers_of
from fastmmoe.study.methods import Method

from ..conftest import N
from .conftest import DATASET

PRUNING = {"prune_layers": (1, 2, 3), "retention": 0.25}
# the same, as the official scripts say it
VARIABLES = {"MERGE_LAYER_LOCS": "1,2,3", "KEEP_TOKEN_RATIO": "0.25"}


def launch(out, *words: str, through: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess:
    command = [*through, "-m", "fastmmoe.harnesses.vlmevalkit", "--model", str(CHECKPOINT), "--data", DATASET]
    command += ["--work-dir", str(out), "--device", "cpu", "--dtype", "float32", "--outcome", str(out / "outcome.json")]
    return subprocess.run([*command, *words], capture_output=True, text=True)


def answers(out) -> list[str]:
    """What the model said, of the one run in a folder."""
    (path,) = out.rglob(f"*_{DATASET}.xlsx")
    return [str(value) for value in pandas.read_excel(path, dtype=str)["prediction"]]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A run by the official variables."""
    out = tmp_path_factory.mktemp("pruned")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in VARIABLES.items():
            patch.setenv(name, value)
        done = launch(out)
    assert done.returncode == 0, done.stderr
    return out


def test_answers_are_those_of_the_study(session, scenes, pruned):
    row = session.evaluate("test", Method("x", configs=(FastMMoEConfig(**PRUNING),)))
    right = [said == scene.answer for said, scene in zip(answers(pruned), scenes, strict=True)]
    assert right == answers_of(row).tolist() and 0.5 * N < sum(right) < N
    found = json.loads((pruned / "outcome.json").read_text())
    # to OCRBench, an answer that contains the right one is right
    lenient = sum(scene.answer in said for said, scene in zip(answers(pruned), scenes, strict=True))
    assert found["scores"] == {DATASET: {"Final Score": lenient}} and not found["failures"]
    assert sum(right) <= lenient <= sum(right) + 0.2 * N
    costs = found["costs"]
    assert costs["answered"] == N and costs["flops_ratio"] == pytest.approx(row["flops_ratio"])
    assert 0 < costs["prefill_latency_s"] <= costs["first_token_latency_s"]


def test_two_processes_share_the_questions(pruned, tmp_path):
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(content_of(FastMMoEConfig(**PRUNING))))
    done = launch(
        tmp_path, "--reduction", str(settings),
        through=(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert answers(tmp_path) == answers(pruned)
    one, two = (json.loads((out / "outcome.json").read_text()) for out in (pruned, tmp_path))
    assert two["scores"] == one["scores"]
    assert two["costs"]["flops"] == pytest.approx(one["costs"]["flops"]) and two["costs"]["answered"] == N
    assert len(list(tmp_path.rglob("costs*.jsonl"))) == 2


def run(out, *words: str) -> None:
    """In this process."""
    torch.set_num_threads(1)
    launcher.main(
        ["--model", str(CHECKPOINT), "--data", DATASET, "--work-dir", str(out), "--device", "cpu", "--dtype", "float32",
         "--outcome", str(out / "outcome.json"), *words]
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """Grows with every question; `asked.fails` is the question in front of which something is raised."""

    class Asked(list):
        fails, error = None, None

    asked, answer = Asked(), Answerer.answer

    def counted(self, conversations, **options):
        if len(asked) == asked.fails:
            raise asked.error
        asked.append(len(conversations))
        return answer(self, conversations, **options)

    monkeypatch.setattr(Answerer, "answer", counted)
    return asked


def outcome(out) -> dict:
    return json.loads((out / "outcome.json").read_text())


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch, asked):
    asked.fails, asked.error = 25, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert not (tmp_path / "outcome.json").exists()
    asked.fails = None
    run(tmp_path)
    assert len(asked) - 25 == N - 20  # VLMEvalKit writes every tenth answer
    first = outcome(tmp_path)
    assert first["costs"]["answered"] == N and first["costs"]["flops_ratio"] == 1.0
    before = len(asked)
    run(tmp_path)
    assert len(asked) == before and outcome(tmp_path) == first
    # another method's answers are others
    monkeypatch.setenv("VISION_EXPERT_REDUCE_FACTOR", "0.25")
    run(tmp_path)
    assert len(asked) == before + N and len(list(tmp_path.rglob(f"*_{DATASET}.xlsx"))) == 2


def test_a_kill_while_answers_are_written_loses_none(tmp_path, monkeypatch, asked):
    asked.fails, asked.error = 25, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    (written,) = tmp_path.rglob(f"01_{DATASET}.pkl")
    assert len(pickle.loads(written.read_bytes())) == 20
    monkeypatch.setattr(pickle, "dump", lambda data, file: (file.write(b"half"), file.flush(), asked.append(1 / 0)))
    asked.fails = None
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert len(pickle.loads(written.read_bytes())) == 20


def test_a_question_that_fails_is_no_wrong_answer(tmp_path, monkeypatch, asked):
    run(tmp_path)
    assert outcome(tmp_path)["scores"]
    monkeypatch.setenv("VISION_EXPERT_REDUCE_FACTOR", "0.5")
    asked.fails, asked.error = len(asked) + 4, AssertionError()
    with pytest.raises(SystemExit, match=f"{DATASET}: AssertionError: "):
        run(tmp_path)
    assert outcome(tmp_path)["failures"] == {DATASET: "AssertionError: "} and not outcome(tmp_path)["scores"]
    monkeypatch.setenv("SKIP_ERR", "1")
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path)


def test_one_of_several_processes_that_fails_ends_them_all(dataset, tmp_path):
    """Its own picture of question 1, the second process's first one, is none."""
    rows = pandas.read_csv(dataset / f"{DATASET}.tsv", sep="\t")
    rows.loc[1, "image"] = base64.b64encode(b"none" * 30).decode()
    rows.to_csv(tmp_path / "Broken.tsv", sep="\t", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMUData", str(tmp_path))
        done = launch(
            tmp_path / "out", "--data", "Broken",
            through=(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        )  # fmt: skip
    assert done.returncode and "UnidentifiedImageError" in done.stderr
    assert not (tmp_path / "out" / "outcome.json").exists()


@pytest.mark.parametrize("judge", [[], ["--judge", "exact_matching"]], ids=["its own judge", "exact matching"])
def test_a_judge_that_does_not_answer_is_no_judgement(dataset, tmp_path, monkeypatch, judge):
    rows = pandas.read_csv(dataset / f"{DATASET}.tsv", sep="\t")[:4]
    rows = rows.assign(A=[eval(answer)[0] for answer in rows["answer"]], B="nothing", answer="A")
    rows.to_csv(tmp_path / "Choices.tsv", sep="\t", index=False)
    monkeypatch.setenv("LMUData", str(tmp_path))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    # it knows none of the words of a choice
    monkeypatch.setattr(Answerer, "answer", lambda *_, **__: [Answer("the first of the two", 1)])
    if judge:
        run(tmp_path / "out", "--data", "Choices", *judge)
        assert outcome(tmp_path / "out")["scores"] == {"Choices": {"split=none|Overall": 0.0}}
    else:
        with pytest.raises(SystemExit, match="Choices: .*--judge exact_matching"):
            run(tmp_path / "out", "--data", "Choices", "--retry", "1")
        assert not outcome(tmp_path / "out")["scores"]


def test_what_is_none_is_named(tmp_path, monkeypatch, capsys):
    def refused(*words: str) -> str:
        with pytest.raises(SystemExit, match="2"):
            run(tmp_path, *words)
        assert not list(tmp_path.glob("*/status.json"))
        return capsys.readouterr().err

    assert "--data NoSuch: VLMEvalKit has no such data set, and " in refused("--data", "NoSuch")
    (tmp_path / "NoQuestions.tsv").write_text("index\tanswer\n")
    with monkeypatch.context() as patch:
        patch.setenv("LMUData", str(tmp_path))
        assert "NoQuestions.tsv has no column `question`" in refused("--data", "NoQuestions")
    assert "--data Video-MME_8frame: holds videos" in refused("--data", "Video-MME_8frame")
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    assert "broken.json: holds no config" in refused("--reduction", str(broken))
    assert "nowhere" in refused("--model", str(tmp_path / "nowhere"))
    for other in ("--base-u=http://x", "--api-m", "--use-vl"):
        assert "would ask another model" in refused(other)
    with monkeypatch.context() as patch:
        patch.setenv("SKIP_ERR", "1")
        assert "SKIP_ERR=1: would score questions that failed" in refused()
    monkeypatch.setenv("KEEP_TOKEN_RATIO", "2")
    assert "environment variable KEEP_TOKEN_RATIO='2'" in refused()


def test_a_calibration_of_another_model_is_refused(tmp_path):
    settings = tmp_path / "settings.json"
    study = {"calibration": {"study": {"model": {"gates_sha256": "0" * 64}}}}
    settings.write_text(json.dumps(content_of(FastMMoEConfig(**PRUNING)) | study))
    with pytest.raises(SystemExit, match="--reduction: is of another model"):
        run(tmp_path, "--reduction", str(settings))
    assert not outcome(tmp_path)["scores"]


def test_fastmmoe_eval(session, tmp_path, monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    words = [sys.executable, "-m", "fastmmoe_cli", "eval", "--harness", "vlmevalkit", "--data", DATASET, "--out",
             str(tmp_path), "--retention", "0.5", "--prune-layers", "1,2,3", "--device", "cpu"]  # fmt: skip
    done = subprocess.run([*words, "--limit", "16", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)["runs"]
    assert [run["name"] for run in runs] == ["dense", "retention 0.5", "environment"]
    ratios = [run["costs"]["flops_ratio"] for run in runs]
    dense = session.evaluate("test", Method("dense"))
    assert runs[0]["scores"][DATASET]["Final Score"] >= answers_of(dense)[:16].sum()
    assert ratios[0] == 1.0 > ratios[1] > ratios[2] and runs[2]["config"]["retention"] == 0.25
    head, _, *lines = (tmp_path / "eval.md").read_text().splitlines()
    assert head.startswith(f"| run | {DATASET}: Final Score | FLOPs |") and lines[2].startswith("| environment | ")
    again = subprocess.run([*words, "--limit", "16", "--resume"], capture_output=True, text=True)
    assert again.returncode == 0 and "environment" in again.stdout and not again.stderr
    monkeypatch.setenv("KEEP_TOKEN_RATIO", "0.9")
    other = subprocess.run([*words, "--limit", "16", "--resume"], capture_output=True, text=True)
    assert other.returncode == 2 and "its run 'environment' has other settings" in other.stderr.replace("\n", " ")
    other = subprocess.run([*words, "--limit", "17", "--resume"], capture_output=True, text=True)
    assert other.returncode == 2 and "holds rows of another study (limit" in other.stderr.replace("\n", " ")


def test_runs_are_told_apart(tmp_path):
    about = {"method": None, "limit": None}
    names = [launcher.run_name(str(tmp_path), about | one) for one in ({}, {"limit": 1}, {"method": {"type": "x"}})]
    assert len(set(names)) == 3 and all(name.startswith(f"{tmp_path.name}-") for name in names)
    assert launcher.run_name(str(tmp_path), about) == names[0]


def test_a_table_of_the_paper(tmp_path):
    """A dry run: every method at every retention."""
    words = [sys.executable, "-m", "fastmmoe_cli", "eval", "--harness", "vlmevalkit", "--data", DATASET, "--out",
             str(tmp_path), "--table", "retention", "--device", "cpu", "--limit", "4", "--json"]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = {run["name"]: run for run in json.loads(done.stdout)["runs"]}
    assert len(runs) == 17 and all(run["costs"]["answered"] == 4 for run in runs.values())
    types = {"dense": None, "fewer experts only": "FastMMoEConfig", "FastV, 0.5": "FastVConfig",
             "SparseVLM, 0.25": "SparseVLMConfig", "random, 0.75": "RandomConfig"}  # fmt: skip
    assert {name: runs[name]["config"] and runs[name]["config"]["type"] for name in types} == types
