"""Random cases of every op, see `fuzz.py`; `make fuzz` runs many of them."""

import os
import random
import traceback

import pytest
import torch

from .fuzz import OPS

FIRST = int(os.environ.get("FASTMMOE_FUZZ_SEED", "0"))
CASES = int(os.environ.get("FASTMMOE_FUZZ_CASES", "15"))  # of each op: the slice that every run has
# seeds that have failed, and what was wrong; a change of `fuzz.py` makes other cases of them
REGRESSIONS: dict[str, list[int]] = {}


# of infinities and NaN in NumPy, which the interpreter computes with
@pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN|divide by zero)")
@pytest.mark.parametrize("op", OPS)
def test_random_cases(op):
    seeds = [*REGRESSIONS.get(op, []), *range(FIRST, FIRST + CASES)]
    failed = []
    for seed in seeds:
        try:
            torch.manual_seed(seed)
            OPS[op](random.Random(seed))
        except Exception:
            failed.append(seed)
            print(f"{op}, seed {seed}:\n{traceback.format_exc()}")
    print(f"{op}: {len(seeds)} cases, seeds {FIRST} to {seeds[-1]}, {len(failed)} failed")
    assert not failed, f"failed; to be listed in REGRESSIONS: {op!r}: {failed}"
