"""Modality-dependent top-K routing in PyTorch: the definition, and the CPU path."""

import torch
import torch.nn.functional as F


def topk_routing_reference(
    logits: torch.Tensor,  # [T, E]
    vision_mask: torch.Tensor | None,  # [T]
    padding_mask: torch.Tensor | None,  # [T]
    correction_bias: torch.Tensor | None,  # [E]
    top_k: int,
    vision_top_k: int,
    scoring: str,
    norm_topk_prob: bool,
    n_group: int,
    topk_group: int,
    routed_scaling_factor: float,
    renormalize: bool,
    return_probs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, num_experts = logits.shape
    z = logits.float()
    probs = z.softmax(-1) if scoring == "softmax" else z.sigmoid()
    scores = probs if correction_bias is None else probs + correction_bias.float()
    if n_group > 1:
        grouped = scores.view(num_tokens, n_group, num_experts // n_group)  # [T, G, E/G]
        best = grouped.sort(dim=-1, descending=True).values
        worth = best[..., :2].sum(-1) if correction_bias is not None else best[..., 0]  # [T, G]
        groups = worth.sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
        allowed = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, groups, True)
        scores = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).view(num_tokens, num_experts)

    ids = _topk_lowest_id_first(scores, top_k)  # [T, K]
    weights = probs.gather(1, ids)
    if vision_mask is not None and vision_top_k < top_k:
        inactive = vision_mask.unsqueeze(1) & (torch.arange(top_k, device=logits.device) >= vision_top_k)
        reduced = weights.masked_fill(inactive, 0.0)
        if renormalize and not norm_topk_prob:
            reduced *= weights.sum(-1, keepdim=True) / reduced.sum(-1, keepdim=True).clamp_min(1e-20)
        weights = torch.where(inactive.any(-1, keepdim=True), reduced, weights)
        ids = ids.masked_fill(inactive, num_experts)
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    weights = weights * routed_scaling_factor
    if padding_mask is not None:
        ids = ids.masked_fill(padding_mask.unsqueeze(1), num_experts)
        weights = weights.masked_fill(padding_mask.unsqueeze(1), 0.0)
    return ids.to(torch.int32), weights, probs if return_probs else probs.new_empty(0)


def gate_routing_reference(
    hidden: torch.Tensor,  # [T, H]
    weight: torch.Tensor,  # [E, H]
    *arguments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gate's logits, and `topk_routing_reference` of them with the other `arguments`."""
    # autocast would round the logits
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.float(), weight.float())  # [T, E]
    return logits, *topk_routing_reference(logits, *arguments)


def _topk_lowest_id_first(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest per row, by falling score; ties go to the lower index (torch.topk promises no order)."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
