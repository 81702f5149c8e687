"""What stock code does in the place of an op, in PyTorch and on whole tensors."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def topk_routing(
    logits: torch.Tensor,  # [T, E]
    top_k: int,
    vision_mask: torch.Tensor,  # bool [T]
    vision_top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' router behind its linear layer, then `mask_vision`."""
    weights, ids = F.softmax(logits, dtype=torch.float, dim=-1).topk(top_k, dim=-1)
    return mask_vision(ids, weights, logits.shape[1], vision_mask, vision_top_k)


def mask_vision(
    ids: torch.Tensor,  # [T, K]
    weights: torch.Tensor,  # [T, K]
    num_experts: int,
    vision_mask: torch.Tensor,  # bool [T]
    vision_top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vision tokens lose the slots behind their first, and all weights are made to sum to 1 again."""
    slot = torch.arange(ids.shape[1], device=ids.device)
    is_off = vision_mask.unsqueeze(1) & (slot >= vision_top_k)
    ids, weights = ids.masked_fill(is_off, num_experts), weights.masked_fill(is_off, 0.0)
    return ids, weights / weights.sum(-1, keepdim=True)


def load_router(weight: torch.Tensor, top_k: int) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """transformers' router with this gate [E, H]: tokens [T, H] to logits and weights in their dtype, and ids."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    experts, hidden = weight.shape
    config = Qwen3MoeConfig(
        hidden_size=hidden, num_experts=experts, num_experts_per_tok=top_k, norm_topk_prob=True
    )
    with torch.device("meta"):
        router = Qwen3MoeTopKRouter(config)
    router.weight = nn.Parameter(weight, requires_grad=False)
    return router


def attention_map(
    query: torch.Tensor,  # [B, Hq, n, D]
    key: torch.Tensor,  # [B, Hkv, n, D]
    causal: torch.Tensor,  # [n, n], 0 or -inf
    scale: float,
) -> torch.Tensor:
    """[B, n]: the last row of the map that transformers' eager attention returns, mean over heads.

    The map alone: the product with the values, which a layer needs anyway, is left out.
    """
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query @ keys.mT * scale + causal
    return F.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)[:, :, -1].float().mean(1)


def attention_row(
    query: torch.Tensor,  # [B, Hq, D]
    key: torch.Tensor,  # [B, Hkv, n, D]
    scale: float,
) -> torch.Tensor:
    """[B, n]: the last row alone, its logits a product in the model's dtype.

    `scaled_dot_product_attention` cannot do it: it returns no probabilities, and an identity in the place of the values
    is a matrix of n x n again.
    """
    grouped = query.unflatten(1, (key.shape[1], -1))
    return F.softmax(grouped @ key.mT * scale, dim=-1, dtype=torch.float32).flatten(1, 2).mean(1)


def sort_pairs(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As transformers' grouped_mm experts do it: (the pairs by expert, those that are off last; where each expert's
    end; the row of each pair)."""
    experts, order = ids.flatten().sort()
    counts = torch.histc(experts.float() if ids.device.type == "cpu" else experts, num_experts, 0, num_experts - 1)
    row = torch.empty_like(order)
    row[order] = torch.arange(len(order), device=ids.device)
    return order, counts.cumsum(0, dtype=torch.int32), row
