"""How tightly the norms of a token's expert outputs concentrate. (The paper's Fig. 5; method section 4.)"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from fastmmoe.families import find_text_model
from fastmmoe.study.observe import PerPrompt, modality_masks, observe
from fastmmoe.study.prompts import Batch
from fastmmoe_kernels import moe_experts


def magnitude_stability(model: PreTrainedModel, batches: Iterable[Batch]) -> list[dict]:
    """V_m per layer and modality in dense prefills, in the rows of `PerPrompt.rows`.

    `stability`: `V_m = 1 - std / mean` of `|E_i(x)|` over the token's top-K experts, the population standard deviation,
    E_i(x) an expert's output before its routing weight; a prompt's mean over tokens, then the mean over prompts.
    """
    family, _, _ = find_text_model(model)
    found = PerPrompt()

    def look(layer: int, experts: nn.Module, args: tuple, output: torch.Tensor, batch: Batch) -> None:
        hidden, ids = args[:2]
        stability = token_stability(expert_norms(experts, hidden, ids)).view(batch.layout.vision_mask.shape)
        for modality, mask in modality_masks(batch).items():
            found.add(layer, modality, "stability", torch.where(mask, stability, 0.0).sum(1), mask.sum(1))

    observe(model, batches, family.experts_of, look)
    return found.rows()


def expert_norms(experts: nn.Module, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`|E_i(x)|`, float32 [T, K], of every token's experts; hidden [T, H], ids [T, K]."""
    ids = ids.to(torch.int32)
    alone = torch.ones(len(ids), 1, device=hidden.device)
    outputs = (
        moe_experts(hidden, experts.gate_up_proj, experts.down_proj, ids[:, k : k + 1].contiguous(), alone)
        for k in range(ids.shape[1])
    )
    return torch.stack([output.float().norm(dim=-1) for output in outputs], 1)


def token_stability(norms: torch.Tensor) -> torch.Tensor:
    """`1 - std / mean` over K, [T, K] -> [T]; 0 where all norms are 0."""
    mean = norms.mean(1)
    return torch.where(mean > 0, 1 - norms.std(1, correction=0) / mean, 0.0)
