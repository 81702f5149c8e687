"""Models that two processes hold together, by gloo on CPUs, against one process: logits, answers, survivors."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from .samples import batch_of_rank
from .worker import CASES, PROCESSES, SPLITS, is_held, load, results, save_tiny

FAMILIES = ("internvl_qwen3_moe", "qwen3_vl_moe")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The models, and what two processes made of them."""
    folder = tmp_path_factory.mktemp("distributed")
    for family in FAMILIES:
        save_tiny(family, folder / family)
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES))
    ran = subprocess.run(
        (*command, "-m", "model.distributed.worker", str(folder)),
        capture_output=True, text=True, timeout=900,
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """family, process -> what one process makes of that process's prompts."""

    @cache
    def of(family: str, rank: int) -> dict[str, dict[str, Any]]:
        return results(load(folder / family), batch_of_rank(family, rank), tuple(CASES))

    return of


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_processes_equal_one(family, split, folder, alone):
    if not is_held(family, split):
        pytest.skip("transformers cannot load it so")
    for rank in range(PROCESSES):
        found = torch.load(folder / f"{family}-{split}-{rank}.pt")
        assert isinstance(found, dict), found
        assert tuple(found) == SPLITS[split].cases
        want = alone(family, 0 if SPLITS[split].shares_batch else rank)
        for case, got in found.items():
            torch.testing.assert_close(got["logits"], want[case]["logits"], rtol=1e-4, atol=1e-4, msg=case)
            for name in ("answers", "tokens", "fates", "pairs"):
                assert str(got.get(name)) == str(want[case].get(name)), (case, name, rank)
