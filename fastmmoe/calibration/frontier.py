"""The search for a pair of thresholds, of text and of vision tokens, that skips a share of the experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

COUNT = 100
# of x in `2 / (1 + exp(-10 (x - 1)))`
FARTHEST = {"text": 0.71, "vision": 0.6}


def thresholds(modality: str) -> tuple[float, ...]:
    """The thresholds that are tried, rising."""
    steps = (FARTHEST[modality] * step / (COUNT - 1) for step in range(COUNT))
    return tuple(2.0 / (1.0 + math.exp(-10.0 * (x - 1.0))) for x in steps)


def frontier(
    text: Sequence[float], vision: Sequence[float], skipped: Callable[[float, float], float], target: float
) -> list[tuple[float, float]]:
    """To every text threshold, the least vision threshold with which the share skipped just reaches the target.

    Walks along the edge, which falls since the share rises with both: at most `len(text) + len(vision)` evaluations.

    Args:
        text, vision: thresholds, rising.
        skipped: (text threshold, vision threshold) -> share of the experts that are skipped.

    Returns:
        Pairs by rising text threshold; empty where no pair reaches the target.
    """
    found: dict[int, tuple[float, float]] = {}
    row, column = 0, len(vision) - 1
    while row < len(text) and column >= 0:
        if skipped(text[row], vision[column]) >= target:
            found[row] = text[row], vision[column]
            column -= 1
        else:
            row += 1
    return list(found.values())
