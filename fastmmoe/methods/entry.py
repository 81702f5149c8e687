"""A method's entry in the study: under which name it is compared with the others, and how it is set up for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastmmoe.config import ReductionConfig


@dataclass(frozen=True)
class Place:
    """Where and how much the study lets methods prune, the same for all that it compares.

    Attributes:
        layers: of the stages, rising; tokens go within these layers or behind them, as is a method's way.
        retention: overall share of the vision tokens left behind the last of them.
        experts: keywords `vision_top_k` and `reduction_layer`, or none for all experts.
        n_vision: vision tokens of every prompt; None where prompts differ.
        preset: FastMMoE's config for the model's family, at layers that fit.
        calibrated: configs that were found for the model.
    """

    layers: tuple[int, ...]
    retention: float
    experts: Mapping[str, Any]
    n_vision: int | None
    preset: ReductionConfig
    calibrated: tuple[ReductionConfig, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A line of the study's tables and plots.

    Attributes:
        name: what they call it.
        colour: of its line, as matplotlib names colours.
        configs: place -> the configs that the batches of questions take in turn; none: it has no place there.
        is_reference: the other lines are compared with it.
    """

    name: str
    colour: str
    configs: Callable[[Place], tuple[ReductionConfig, ...]]
    is_reference: bool = False
