"""Are neighbours routed alike, more than any two tokens of a prompt? (The paper's Fig. 1; method section 4.)"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from fastmmoe.families import find_text_model
from fastmmoe.study.observe import PerPrompt, modality_masks, observe
from fastmmoe.study.prompts import Batch


def routing_similarity(model: PreTrainedModel, batches: Iterable[Batch]) -> list[dict]:
    """Similarity and entropy of the routing, per layer and modality, in dense prefills.

    Quantities, each a prompt's mean over pairs or tokens, then the mean over prompts (see `PerPrompt.rows`):
    `adjacent`: cosine of the gate's probabilities of two tokens of one modality that stand side by side;
    `any pair`: of any two tokens of one modality, the control: what a random pair has in expectation;
    `entropy`: of a token's probabilities over the experts (scores that do not sum to 1 are normalised), in nats.
    """
    family, _, _ = find_text_model(model)
    found = PerPrompt()

    def look(layer: int, gate: nn.Module, args: tuple, output: tuple, batch: Batch) -> None:
        scoring = family.routing_options(gate)["scoring"]
        logits = output[0].float().view(*batch.layout.vision_mask.shape, -1)
        probs = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
        for modality, mask in modality_masks(batch).items():
            for quantity, (values, counts) in summarise(probs, mask).items():
                found.add(layer, modality, quantity, values, counts)

    observe(model, batches, family.gate_of, look)
    return found.rows()


def summarise(probs: torch.Tensor, mask: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Sums over the tokens in `mask` (bool [B, n]) of each sample, and over how many; probs float32 [B, n, E]."""
    tokens = mask.sum(1)
    unit = torch.where(mask.unsqueeze(-1), nn.functional.normalize(probs.double(), dim=-1), 0.0)
    is_pair = mask[:, 1:] & mask[:, :-1]
    cosines = (unit[:, 1:] * unit[:, :-1]).sum(-1)
    share = probs / probs.sum(-1, keepdim=True)
    entropy = torch.special.entr(share).sum(-1)
    # the sum over all pairs is the square of the sum, less every token with itself
    pairs = unit.sum(1).square().sum(-1) - tokens
    return {
        "adjacent": (torch.where(is_pair, cosines, 0.0).sum(1), is_pair.sum(1)),
        "any pair": (pairs, tokens * (tokens - 1)),
        "entropy": (torch.where(mask, entropy, 0.0).sum(1), tokens),
    }
