"""Greedy tokens through vLLM's engine equal those of transformers with FastMMoE, whatever else the engine runs."""

import random

import pytest

from .prompts import CASES
from .reference import answer

ALONE = {"names": list(CASES), "every": None}
TOGETHER = [{"names": random.Random(seed).sample(list(CASES), len(CASES)), "every": 0} for seed in range(3)]
STAGGERED = {"names": [*CASES, *reversed(CASES)], "every": 3}

SETTINGS = {
    "experts": {"vision_top_k": 1, "reduction_layer": 1},
    "prune": {"vision_top_k": None, "retention": 0.4, "prune_layers": [2, 4, 6]},
    "both": {"vision_top_k": 2, "retention": 0.4, "prune_layers": [2, 4, 6], "merge_ratio": 0.2},
    "redundancy": {
        "vision_top_k": 1, "retention": 0.3, "prune_layers": [0, 1, 5], "keep_by": "redundancy", "steepness": 0.8
    },
}  # fmt: skip


def check(result, directory, reduction, schedules):
    """All answers equal; how many differ from the dense ones."""
    wrong = [
        (name, tokens, expected)
        for schedule in result["answers"]
        for name, tokens in schedule
        if tokens != (expected := answer(directory, name, reduction)[0])
    ]
    assert sum(map(len, result["answers"])) == sum(len(schedule["names"]) for schedule in schedules)
    assert not wrong, f"{len(wrong)} wrong, the first: {wrong[0]}"
    return sum(answer(directory, name, reduction)[0] != answer(directory, name, None)[0] for name in CASES)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["qwen3_vl_moe", "internvl_qwen3_moe"])
def test_v1(checkpoint, engine, name, setting):
    directory, reduction = checkpoint(name), SETTINGS[setting]
    schedules = [ALONE, *TOGETHER, STAGGERED]
    result = engine(directory, schedules, reduction)
    changed = check(result, directory, reduction, schedules)
    assert changed >= 3  # else nothing was reduced
    for case in CASES:
        left = answer(directory, case, reduction)[1]
        assert result["survivors"][case] == left, case
        if CASES[case].sizes and "prune_layers" in reduction:
            assert left
