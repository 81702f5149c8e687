"""Random cases of every op, see `fuzz.py`; `make fuzz` runs many of them."""

import os
import random
import traceback

import pytest
import torch

from .fuzz import OPS

FIRST = int(os.environ.get("FASTMMOE_FUZZ_SEED", "0"))
CASES = int(os.environ.get("FASTMMOE_FUZZ_CASES", "15"))  # of each op: the slice that every run has
# seeds that have failed; a change of a function in `fuzz.py` makes other cases of its seeds
REGRESSIONS = {
    "topk_routing": [21, 25, 29, 30, 41],  # NaN: another expert, one that does not exist, weights in inactive slots
    "gate_routing": [23],  # likewise
    "last_query_attention": [16],  # NaN at keys that a head does not see
    "window_redundancy": [50],  # one NaN importance in all windows of a sample
}


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
