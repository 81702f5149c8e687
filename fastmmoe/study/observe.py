"""Look into the layers of a dense prefill, and sum up per layer and modality what was seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from fastmmoe.families import find_text_model
from fastmmoe.study.answers import prefill
from fastmmoe.study.prompts import Batch

MODALITIES = ("vision", "text")


@dataclass
class PerPrompt:
    """One value per prompt that has any, by (layer, modality, quantity); each prompt counts alike."""

    values: dict[tuple[int, str, str], list[float]] = field(default_factory=dict)

    def add(self, layer: int, modality: str, quantity: str, values: torch.Tensor, counts: torch.Tensor) -> None:
        """`values` [B] are sums over `counts` [B] tokens or pairs; their means are kept."""
        is_there = counts > 0
        means = values[is_there].double() / counts[is_there]
        self.values.setdefault((layer, modality, quantity), []).extend(means.tolist())

    def rows(self) -> list[dict]:
        """Per layer, modality and quantity: the mean over prompts, its standard error, and how many prompts there are.

        The standard error is the sample standard deviation over sqrt(prompts), None for one prompt.
        """
        rows = []
        for (layer, modality, quantity), values in sorted(self.values.items()):
            n = len(values)
            error = float(np.std(values, ddof=1) / n**0.5) if n > 1 else None
            row = {"layer": layer, "modality": modality, "quantity": quantity}
            rows.append(row | {"mean": float(np.mean(values)), "standard_error": error, "prompts": n})
        return rows


def modality_masks(batch: Batch) -> dict[str, torch.Tensor]:
    """Which tokens are vision and which are text, bool [B, n] each, padding in neither."""
    vision = batch.layout.vision_mask
    return {"vision": vision, "text": batch.valid_mask & ~vision}


@torch.inference_mode()
def observe(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    part: Callable[[nn.Module], nn.Module],
    look: Callable[[int, nn.Module, tuple, object, Batch], None],
) -> None:
    """Run dense prefills and call `look(layer, module, args, output, batch)` behind a module of every MoE layer.

    Args:
        part: decoder layer -> the module to look at.
    """
    family, text, _ = find_text_model(model)
    layers = {number: part(layer) for number, layer in enumerate(text.layers) if family.is_moe(layer)}
    for batch in batches:
        batch = batch.to(model.device)
        with _hooked(layers, look, batch):
            prefill(model, batch, use_cache=False)


@contextmanager
def _hooked(layers: dict[int, nn.Module], look: Callable, batch: Batch) -> Iterator[None]:
    def behind(number: int) -> Callable:
        return lambda module, args, output: look(number, module, args, output, batch)

    handles = [module.register_forward_hook(behind(number)) for number, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
