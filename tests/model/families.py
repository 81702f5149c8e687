"""A tiny model and a batch of every family, and where its parity with an oracle is tested; by `Family.name`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .tiny import tiny_batch, tiny_internvl
from .tiny_deepseek import tiny_deepseek_batch, tiny_deepseek_vl2


@dataclass(frozen=True)
class TinyFamily:
    """How tests make a family's models.

    Attributes:
        model: () -> a float32 model in evaluation mode, of layers enough to prune at layers 1 and 3.
        batch: the model -> inputs of two samples of different length, with images.
        parity: module of `tests/model` that compares an enabled model with an oracle.
    """

    model: Callable[..., torch.nn.Module]
    batch: Callable[[torch.nn.Module], dict[str, torch.Tensor]]
    parity: str


TINY = {
    "internvl+qwen3_moe": TinyFamily(tiny_internvl, tiny_batch, "test_parity_internvl"),
    "deepseek_vl_v2+deepseek_v2": TinyFamily(
        partial(tiny_deepseek_vl2, "small"), lambda model: tiny_deepseek_batch(), "test_parity_deepseek_vl2"
    ),
}
