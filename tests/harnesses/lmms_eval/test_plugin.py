"""lmms-eval asks our model: answers and accuracy are the study's, stopped runs go on, failures are no wrong answers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.tasks import TaskManager
from paper.page import rows
from transformers import AutoConfig

from fastmmoe import FastMMoEConfig
from fastmmoe.families import architecture_of
from fastmmoe.harnesses.answers import Answerer
from fastmmoe.harnesses.lmms_eval.evaluate import Tasks
from fastmmoe.harnesses.lmms_eval.model import FastMMoE
from fastmmoe.harnesses.paper import TABLES
from fastmmoe.scenes import CHECKPOINT
from fastmmoe.study.accuracy import answers_of
from fastmmoe.study.methods import Method

from ..conftest import N
from .conftest import TASK

PRUNING = {"prune_layers": (1, 2, 3), "retention": 0.25}
COMMAND = ["--tasks", TASK, "--retention", "0.5", "0.25", "--prune-layers", "1,2,3", "--batch", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return FastMMoE(str(CHECKPOINT), batch_size=7, device="cpu", dtype="float32")


def command(*words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", *words], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("reduced", [False, True], ids=["dense", "reduced"])
def test_accuracy_is_that_of_the_study(model, session, scenes, tasks, tmp_path, monkeypatch, reduced):
    config = FastMMoEConfig.preset(session.model, **PRUNING) if reduced else None
    row = session.evaluate("test", Method("x", configs=(config,) if config else ()))
    said, answer = [], Answerer.answer

    def noted(self, conversations, **options):
        answers = answer(self, conversations, **options)
        said.extend(one.text for one in answers)
        return answers

    monkeypatch.setattr(Answerer, "answer", noted)
    found = Tasks([TASK], tasks, None).run(model, config, tmp_path)
    right = [text == scene.answer for text, scene in zip(said, scenes, strict=True)]
    assert right == answers_of(row).tolist()
    # to mmmu, an answer of several numbers is right if one of them is
    one_word = [" " not in text for text in said]
    assert found["n"] == {TASK: N} and sum(one_word) > 0.7 * N
    lenient = sum(a or not b for a, b in zip(right, one_word, strict=True)) / N
    rounding = 1e-5
    assert sum(right) / N - rounding <= found["scores"][TASK]["mmmu_acc"] <= lenient + rounding
    costs = found["costs"]
    assert costs["flops_ratio"] == pytest.approx(row["flops_ratio"]) and costs["flops"] == pytest.approx(row["flops"])
    assert 0 < costs["prefill_latency_s"] <= costs["first_token_latency_s"]


def test_a_stopped_run_goes_on_where_it_was(model, tasks, tmp_path, monkeypatch):
    whole, batches, answer = Tasks([TASK], tasks, None), [], Answerer.answer

    def counted(self, conversations, **options):
        if len(batches) == 3:
            raise KeyboardInterrupt
        batches.append(len(conversations))
        return answer(self, conversations, **options)

    monkeypatch.setattr(Answerer, "answer", counted)
    with pytest.raises(KeyboardInterrupt):
        whole.run(model, None, tmp_path)
    assert batches == [7, 7, 7]
    monkeypatch.setattr(Answerer, "answer", answer)
    before = model.answerer.costs.prompts
    resumed = whole.run(model, None, tmp_path)
    assert model.answerer.costs.prompts - before == N - 21
    assert resumed["scores"] == whole.run(model, None, tmp_path / "anew")["scores"]
    before = model.answerer.costs.prompts
    assert whole.run(model, None, tmp_path) == resumed | {"costs": {}}
    assert model.answerer.costs.prompts == before


def test_answers_are_kept_by_model_and_config(model, tasks, tmp_path, monkeypatch):
    """Also on file systems on which lmms-eval keeps its answers elsewhere, all of one run's name together."""
    from lmms_eval.caching import response_cache

    monkeypatch.setattr(response_cache, "detect_fs_type", lambda path: response_cache.FsType.REMOTE)
    monkeypatch.setattr(response_cache, "find_local_scratch", lambda: str(tmp_path / "scratch"))
    some = Tasks([TASK], tasks, 14)
    reduced = FastMMoEConfig(vision_top_k=1, reduction_layer=0)
    for config, asked in ((None, 14), (reduced, 14), (None, 0), (reduced, 0)):
        before = model.answerer.costs.prompts
        some.run(model, config, tmp_path / "answers")
        assert model.answerer.costs.prompts - before == asked


def test_a_request_that_fails_is_no_wrong_answer(model, tasks, tmp_path, monkeypatch):
    def fail(self, conversations, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Answerer, "answer", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        Tasks([TASK], tasks, None).run(model, None, tmp_path)


def test_what_is_not_supported_is_refused(model):
    for ask in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="not supported, expected generate_until"):
            ask([])
    video = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    model.task_dict["t"] = {"test": [None]}
    for messages, asked, says in (
        (video, {}, "t, document 0: holds videos or sounds"),
        ([], {"best_of": 2}, "t: generation_kwargs best_of=2 not supported"),
    ):
        arguments = ("", lambda document, messages=messages: messages, asked, 0, "t", "test")
        request = Instance("generate_until", arguments, 0, metadata={"task": "t", "doc_id": 0, "repeats": 1})
        with pytest.raises(ValueError, match=says):
            list(model.generate_until([request]))
    with pytest.raises(ValueError, match="tasks: lmms-eval has no nosuch"):
        Tasks(["nosuch"], None, None)
    with pytest.raises(ValueError, match="batch_size: expected a number of prompts, got 'auto'"):
        FastMMoE(str(CHECKPOINT), batch_size="auto")


def test_lmms_evals_own_command_line(tasks, tmp_path):
    arguments = f"pretrained={CHECKPOINT},dtype=float32,prune_layers=[1,2,3],retention=0.25"
    words = (
        "lmms_eval", "eval", "--model", "fastmmoe", "--model_args", arguments, "--tasks", TASK, "--include_path",
        str(tasks), "--batch_size", "8", "--device", "cpu", "--limit", "15", "--log_samples",
    )  # fmt: skip
    launchers = {
        "one process": (),
        "accelerate": ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m"),
        "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"),
    }
    answers = {}
    for name, launcher in launchers.items():
        out = tmp_path / name
        done = command(*launcher, *words, "--output_path", str(out))
        assert done.returncode == 0, done.stderr
        (path,) = out.rglob("*_results.json")
        results = json.loads(path.read_text())
        assert results["results"][TASK]["mmmu_acc,none"] > 0.7
        assert results["config"]["model"] == "fastmmoe"
        (path,) = out.rglob("*_samples_*.jsonl")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        answers[name] = {sample["doc_id"]: sample["filtered_resps"] for sample in samples}, results["results"][TASK]
    # 15 documents, of which one process has eight and the other seven and one again
    assert sorted(answers["one process"][0]) == list(range(15))
    assert answers["accelerate"] == answers["torchrun"] == answers["one process"]


@pytest.mark.parametrize("table", TABLES)
def test_tables_of_the_paper(tasks, tmp_path, table):
    """A dry run, by the small model and on a task of its own."""
    done = command(
        "fastmmoe_cli", "eval", "--table", table, "--harness", "lmms-eval", "--tasks", TASK, "--include-path",
        str(tasks), "--limit", "8", "--batch", "8", "--device", "cpu", "--out", str(tmp_path), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)["runs"]
    config = AutoConfig.from_pretrained(CHECKPOINT)
    assert [run["name"] for run in runs] == list(TABLES[table].configs(config, architecture_of(config)))
    assert all(run["n"] == {TASK: 8} and run["costs"]["answered"] == 8 for run in runs)
    assert runs[0]["scores"][TASK]["mmmu_acc"] > 0.7
    assert all(run["costs"]["flops_ratio"] < 1 for run in runs[1:])
    head, *filled = rows(TABLES[table], [], json.loads((tmp_path / "eval.json").read_text()))
    assert head[:3] == ["run", f"{TASK} mmmu_acc", "retained"] and all(all(row) for row in filled)


def test_fastmmoe_eval(tasks, tmp_path):
    words = ("fastmmoe_cli", "eval", "--out", str(tmp_path), "--include-path", str(tasks), *COMMAND)
    done = command(*words, "--limit", "16", "--json")
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)["runs"]
    assert [run["name"] for run in runs] == ["dense", "retention 0.5", "retention 0.25"]
    assert runs[0]["config"] is None and runs[2]["config"]["retention"] == 0.25
    ratios = [run["costs"]["flops_ratio"] for run in runs]
    assert ratios == pytest.approx([1.0, 0.51, 0.39], abs=0.01)
    assert all(run["n"] == {TASK: 16} and run["scores"][TASK]["mmmu_acc"] > 0.7 for run in runs)
    assert json.loads((tmp_path / "eval.json").read_text())["rows"] == runs
    again = command(*words, "--limit", "16", "--resume")
    assert again.returncode == 0 and "retention" in again.stdout
    assert "| retention 0.25 |" in (tmp_path / "eval.md").read_text()
    refused = command(*words, "--limit", "17", "--resume")
    assert refused.returncode == 2 and "holds rows of another study (limit" in refused.stderr
    # all answers are there: another process asks for none of them
    (tmp_path / "eval.json").unlink()
    runs = json.loads(command(*words, "--limit", "16", "--json", "--resume").stdout)["runs"]
    assert [run["costs"] for run in runs] == [{}, {}, {}]
    # but by one that starts anew
    runs = json.loads(command(*words, "--limit", "16", "--json", "--overwrite").stdout)["runs"]
    assert [run["costs"]["answered"] for run in runs] == [16, 16, 16]


def test_the_example(tasks):
    """examples/harness.py"""
    spec = importlib.util.spec_from_file_location("harness", Path(__file__).parents[3] / "examples/harness.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    options = dict(limit=8, device="cpu", task_manager=TaskManager(include_path=str(tasks), include_defaults=False))
    found = example.main(str(CHECKPOINT), TASK, "retention=0.5,prune_layers=[1,2,3]", **options)
    assert set(found) == {"dense", "reduced"} and found["dense"]["mmmu_acc,none"] > 0.7
