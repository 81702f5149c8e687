"""What the ops launch: a new length compiles nothing, and what models need is what is compiled ahead of time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("launches.py")
LENGTHS = ["routing", "routing, 72 experts", "gate", "gate, padding", "attention", "attention, batch",
           "attention, tokens first", "attention, odd head", "attention, rows and sinks", "prune", "prune, batch",
           "experts"]  # fmt: skip
MODELS = ["InternVL3.5-30B-A3B", "MiniMax-M3", "DeepSeek-VL2 Small", "DeepSeek-VL2", "gpt-oss-20b", "Aria",
          "Gemma-4-26B-A4B", "Nemotron-3-Nano"]  # fmt: skip


@pytest.fixture(scope="module")
def report():
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("scenario", LENGTHS)
def test_a_new_length_compiles_nothing(report, scenario):
    first, *others = report["lengths"][scenario]
    assert first
    for other in others:
        assert other == first


def test_fifty_batches_compile_nothing(report):
    """Experts: 1 to 16,384 tokens, all row tiles. How many slots are active is data, and cannot matter."""
    warm = set(report["warm-up"])
    assert len(report["batches"]) == 50 and len({tuple(batch) for batch in report["batches"]}) == 4
    for batch in report["batches"]:
        assert set(batch) <= warm


@pytest.mark.parametrize("model", MODELS)
def test_launches_of_models_are_compiled_ahead_of_time(report, model):
    assert report["models"][model]
    assert not sorted(set(report["models"][model]) - set(report["variants"]))


def test_every_scenario_is_tested(report):
    assert list(report["lengths"]) == LENGTHS and list(report["models"]) == MODELS
