"""Pruning that does not look at the picture: at random, and at equal distances.

At FastMMoE's own layers and place, in front of a prune layer's MoE, and with its counts (method section 2.1).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from fastmmoe.baselines.base import BaselineConfig, checked
from fastmmoe.config import StagedConfig, int_from
from fastmmoe.pruning import Pruning, StageInput, keep_best
from fastmmoe_kernels import PrunedBatch, VisionLayout


@dataclass(frozen=True)
class _BlindConfig(BaselineConfig, StagedConfig):
    """Base of the configs that prune at FastMMoE's layers.

    Args:
        prune_layers, retention, keep_ratios: as in `FastMMoEConfig`.
    """

    prune_layers: tuple[int, ...] = ()
    retention: float = 1.0
    keep_ratios: tuple[float, ...] | None = None

    def importance(self, stage: int, layout: VisionLayout) -> torch.Tensor:
        """float32 [B, n]: what a stage (counted from 0) ranks the vision tokens by."""
        raise NotImplementedError

    def pruning(self) -> Pruning:
        return _BlindPruning(self)


class _BlindPruning(Pruning):
    looks = False

    def prune(self, tokens: StageInput) -> PrunedBatch:
        config, layout = self.config, tokens.layout
        targets = tuple(config.vision_left(tokens.stage, n) for n in layout.n_vision)
        return keep_best(tokens, config.importance(tokens.stage, layout), targets, config.backend)


@dataclass(frozen=True)
class RandomConfig(_BlindConfig):
    """Keep vision tokens drawn at random.

    The draw depends on the seed, the layer and the number of vision tokens alone, so that neither a sample's
    neighbours in the batch nor earlier prefills change its result: samples of one size keep the same places, and
    independent draws take several seeds.

    Args:
        prune_layers, retention, keep_ratios: as in `FastMMoEConfig`.
        seed: of the draw.
    """

    seed: int = checked(0, int_from(0))

    def importance(self, stage: int, layout: VisionLayout) -> torch.Tensor:
        return random_importance(layout, self.seed, self.prune_layers[stage])


@dataclass(frozen=True)
class UniformConfig(_BlindConfig):
    """Keep vision tokens at equal distances in the sequence: of n tokens t, numbers `k * n // t` for k in 0..t-1.

    Args:
        prune_layers, retention, keep_ratios: as in `FastMMoEConfig`.
    """

    def importance(self, stage: int, layout: VisionLayout) -> torch.Tensor:
        return uniform_importance(layout, tuple(self.vision_left(stage, n) for n in layout.n_vision))


def random_importance(layout: VisionLayout, seed: int, layer: int) -> torch.Tensor:
    """A random order of each sample's vision tokens, float32 [B, n] on the layout's device; 0 at other tokens."""
    return _at_vision_tokens(layout, [_random_row(n, seed, layer) for n in layout.n_vision])


def uniform_importance(layout: VisionLayout, targets: tuple[int, ...]) -> torch.Tensor:
    """1 at `targets[b]` equally distant vision tokens of sample b, else 0: float32 [B, n] on the layout's device."""
    return _at_vision_tokens(layout, [_stride_row(n, t) for n, t in zip(layout.n_vision, targets, strict=True)])


@lru_cache(maxsize=256)
def _random_row(n: int, seed: int, layer: int) -> tuple[int, ...]:
    # layers draw independently
    generator = torch.Generator().manual_seed(seed * 100_003 + layer)
    # the numbers of a permutation, not random numbers: no ties, which would favour early tokens
    return tuple(torch.randperm(n, generator=generator).tolist())


@lru_cache(maxsize=256)
def _stride_row(n: int, target: int) -> tuple[int, ...]:
    chosen = {number * n // target for number in range(target)}
    return tuple(int(number in chosen) for number in range(n))


def _at_vision_tokens(layout: VisionLayout, rows: list[tuple[int, ...]]) -> torch.Tensor:
    """Each sample's values `[n_vision]`, known to the host, to where its vision tokens are: [B, n], 0 elsewhere."""
    most = max(layout.n_vision)
    # kept by the layout, and so for a CUDA graph
    table = layout.device_table(tuple(row + (0,) * (most - len(row)) for row in rows)).float()
    vision = layout.vision_mask
    ordinal = (vision.cumsum(1) - 1).clamp_min(0)
    return torch.where(vision, table.gather(1, ordinal), 0.0)
