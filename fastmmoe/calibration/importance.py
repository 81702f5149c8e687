"""How much each layer's MoE matters to the answers, for text and for vision tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fastmmoe.calibration.samples import Sample, answer_log_probs, divergence
from fastmmoe.families import find_text_model

MODALITIES = ("text", "vision")


def moe_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Number -> MoE of the layers that have one.

    Raises:
        ValueError: the family's MoE is no module of its own.
    """
    family, text, _ = find_text_model(model)
    if not family.moe:
        raise ValueError(f"model: {family.title}'s MoE is no module of its own, and cannot be left out")
    return {number: family.moe_of(layer) for number, layer in enumerate(text.layers) if family.is_moe(layer)}


def divergences(model: PreTrainedModel, sample: Sample) -> dict[str, dict[int, float]]:
    """By modality and layer, how far the answer moves without that layer's MoE.

    KL(dense || without) over the vocabulary, summed over the answer's tokens, the whole MoE's output (shared experts
    included) replaced by its input at the tokens of that modality.

    Raises:
        ValueError: the model gives a token of the answer no finite probability.
    """
    dense = answer_log_probs(model, sample)
    if not dense.isfinite().all():
        raise ValueError("model: its logits are not finite, expected those of a model that answers")
    found: dict[str, dict[int, float]] = {modality: {} for modality in MODALITIES}
    for modality in MODALITIES:
        for number, moe in moe_layers(model).items():
            with _left_out(moe, sample.masks[modality]):
                found[modality][number] = divergence(dense, answer_log_probs(model, sample))
    return found


def importances(sums: Sequence[dict[str, dict[int, float]]], num_layers: int) -> dict[str, tuple[float, ...]]:
    """Alpha by modality, one number per layer: the samples' divergences, divided so that all layers sum to 1.

    Layers without a MoE have 0. (That all are first divided by the number of the answers' tokens cancels out.)

    Raises:
        ValueError: no layer matters to any answer.
    """
    found = {}
    for modality in MODALITIES:
        totals = [sum(one[modality].get(number, 0.0) for one in sums) for number in range(num_layers)]
        if not sum(totals) > 0:
            raise ValueError(f"data: no layer's {modality} experts make a difference to any answer, expected others")
        found[modality] = tuple(total / sum(totals) for total in totals)
    return found


@contextmanager
def _left_out(moe: nn.Module, mask: torch.Tensor) -> Iterator[None]:
    """Within a `with` block a MoE returns its input at the tokens of `mask` [1, n]."""

    def replace(module: nn.Module, args: tuple, output: Any) -> Any:
        mixed, *others = output if isinstance(output, tuple) else (output,)
        hidden = args[0].view_as(mixed)
        mixed = torch.where(mask.view(*mixed.shape[:-1], 1).to(mixed.device), hidden, mixed)
        return (mixed, *others) if isinstance(output, tuple) else mixed

    handle = moe.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
