"""Pruning at equal distances."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from fastmmoe.methods.blind import BlindConfig, at_vision_tokens
from fastmmoe.methods.entry import Entry, Place
from fastmmoe_kernels import VisionLayout


@dataclass(frozen=True)
class UniformConfig(BlindConfig):
    """Keep vision tokens at equal distances in the sequence: of n tokens t, numbers `k * n // t` for k in 0..t-1.

    Args:
        prune_layers, retention, keep_ratios: as in `FastMMoEConfig`.
    """

    def importance(self, stage: int, layout: VisionLayout) -> torch.Tensor:
        return uniform_importance(layout, tuple(self.vision_left(stage, n) for n in layout.n_vision))

    @classmethod
    def study_entries(cls) -> tuple[Entry, ...]:
        """One entry."""

        def configs(place: Place) -> tuple[UniformConfig, ...]:
            return (cls(prune_layers=place.layers, retention=place.retention, **place.experts),)

        return (Entry("uniform", "0.5", configs, is_reference=True),)


def uniform_importance(layout: VisionLayout, targets: tuple[int, ...]) -> torch.Tensor:
    """1 at `targets[b]` equally distant vision tokens of sample b, else 0: float32 [B, n] on the layout's device."""
    return at_vision_tokens(layout, [_stride_row(n, t) for n, t in zip(layout.n_vision, targets, strict=True)])


@lru_cache(maxsize=256)
def _stride_row(n: int, target: int) -> tuple[int, ...]:
    chosen = {number * n // target for number in range(target)}
    return tuple(int(number in chosen) for number in range(n))
