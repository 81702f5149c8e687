"""Pruning at random."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from fastmmoe.config import checked, int_from
from fastmmoe.methods.blind import BlindConfig, at_vision_tokens
from fastmmoe.methods.entry import Entry, Place
from fastmmoe_kernels import VisionLayout

STUDY_SEEDS = 8  # one draw would favour some places of every picture


@dataclass(frozen=True)
class RandomConfig(BlindConfig):
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

    @classmethod
    def study_entries(cls) -> tuple[Entry, ...]:
        """One entry, with several draws in turn."""

        def configs(place: Place) -> tuple[RandomConfig, ...]:
            where = {"prune_layers": place.layers, "retention": place.retention, **place.experts}
            return tuple(cls(seed=seed, **where) for seed in range(STUDY_SEEDS))

        return (Entry("random", "0.7", configs),)


def random_importance(layout: VisionLayout, seed: int, layer: int) -> torch.Tensor:
    """A random order of each sample's vision tokens, float32 [B, n] on the layout's device; 0 at other tokens."""
    return at_vision_tokens(layout, [_random_row(n, seed, layer) for n in layout.n_vision])


@lru_cache(maxsize=256)
def _random_row(n: int, seed: int, layer: int) -> tuple[int, ...]:
    # layers draw independently; a generator takes 64 bits
    generator = torch.Generator().manual_seed((seed * 100_003 + layer) % 2**63)
    # the numbers of a permutation, not random numbers: no ties, which would favour early tokens
    return tuple(torch.randperm(n, generator=generator).tolist())
