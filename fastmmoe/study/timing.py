"""How long the language model's prefill takes under each method: round after round, every method once per round."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

import fastmmoe
from fastmmoe.prefill.installation import plan_in_force
from fastmmoe.study.answers import prefill, reduced
from fastmmoe.study.methods import Method
from fastmmoe.study.prompts import Batch


@torch.inference_mode()
def prefill_times(
    model: PreTrainedModel,
    batch: Batch,
    methods: Sequence[Method],
    rounds: int,
    progress: Callable[[int], None] = lambda timed: None,
) -> list[dict[str, Any]]:
    """Time one batch's prefill under every method, tokenizer and decoding not included.

    Nor is the vision tower, but where the whole model runs each time (see `fastmmoe.study.prompts`).

    Each round runs all methods in an order of its own, so that a change of clock or load meets all alike; a first round
    warms up and does not count. Ratios are taken within a round.

    Args:
        methods: the first is what the others are compared with.
        rounds: how many count.
        progress: called with 1 after every prefill; there are `len(methods) * (rounds + 1)`.

    Returns:
        A row per method: its description, `seconds` (median), `time_ratio` (median of the rounds' ratios to the first
        method) with its quartiles, `rounds`, `batch` and `tokens` (of a prompt), `flops_ratio`.
    """
    batch = batch.to(model.device)
    order = list(range(len(methods)))
    rng = random.Random(0)
    seconds: list[list[float]] = [[] for _ in methods]
    costs = [1.0] * len(methods)
    for number in range(rounds + 1):
        rng.shuffle(order)
        for which in order:
            with reduced(model, methods[which].config):
                _wait(model.device)
                start = time.perf_counter()
                prefill(model, batch)
                _wait(model.device)
                taken = time.perf_counter() - start
                if not number:
                    costs[which] = _flops_ratio(model)
            if number:
                seconds[which].append(taken)
            progress(1)
    return [
        {**method.describe(), **_figures(taken, seconds[0], batch), "flops_ratio": cost}
        for method, taken, cost in zip(methods, seconds, costs, strict=True)
    ]


def _flops_ratio(model: PreTrainedModel) -> float:
    """FLOPs of the last prefill, of the dense model's: without the experts that tokens skipped by need."""
    if plan_in_force(model) is None:
        return 1.0
    counted = fastmmoe.report(model).flops
    return counted.reduced / counted.dense


def _figures(taken: list[float], first: list[float], batch: Batch) -> dict[str, Any]:
    ratios = sorted(one / other for one, other in zip(taken, first, strict=True))
    return {
        "seconds": median(taken),
        "time_ratio": median(ratios),
        "time_ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "rounds": len(ratios),
        "batch": len(batch.numbers),
        "tokens": batch.layout.width,
    }


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
