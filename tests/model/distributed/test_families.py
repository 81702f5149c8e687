"""Every family's model that two processes hold, against one process. Nightly: `FASTMMOE_DISTRIBUTED_FAMILIES=1`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from ..families import LOOPS
from .families import REFUSED, SPLITS, STOCK_FAILS, logits, save
from .launch import launch
from .worker import PROCESSES

pytestmark = pytest.mark.skipif(not os.environ.get("FASTMMOE_DISTRIBUTED_FAMILIES"), reason="nightly")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for name in LOOPS:
        save(name, folder / name)
    launch("model.distributed.families", folder)
    return folder


@pytest.mark.parametrize("name", LOOPS)
def test_processes_equal_one(name, folder):
    model = AutoModelForImageTextToText.from_pretrained(folder / name, dtype=torch.float32).eval()
    want = logits(model, name, torch.load(folder / name / "inputs.pt"))
    assert not any(isinstance(one, str) for one in want.values()), want
    for split in SPLITS:
        if split in STOCK_FAILS.get(name, ()):
            continue
        for rank in range(PROCESSES):
            got = torch.load(folder / f"{name}-{split}-{rank}.pt")
            tolerance = max(1e-4, LOOPS[name].tolerance, 10 * (got["stock"] - want["stock"]).abs().max().item())
            for case, one in got.items():
                if isinstance(one, str):
                    assert REFUSED.get(name, "nothing") in one, (name, split, case)
                else:
                    torch.testing.assert_close(one, want[case], rtol=0, atol=tolerance, msg=f"{name}, {split}, {case}")
