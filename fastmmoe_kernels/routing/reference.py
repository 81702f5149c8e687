"""Modality-dependent top-K routing in PyTorch: the definition, and the CPU path."""

import torch
import torch.nn.functional as F

from fastmmoe_kernels.routing.options import RoutingOptions


def topk_routing_reference(
    logits: torch.Tensor,  # [T, E]
    options: RoutingOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, num_experts = logits.shape
    vision_mask, padding_mask, bias = options.vision_mask, options.padding_mask, options.correction_bias
    top_k, vision_top_k, n_group = options.top_k, options.vision_top_k, options.n_group
    z = logits.float()
    probs = z.softmax(-1) if options.scoring == "softmax" else z.sigmoid()
    scores = probs if bias is None else probs + bias.float()
    if n_group > 1:
        grouped = scores.view(num_tokens, n_group, num_experts // n_group)  # [T, G, E/G]
        best = grouped.sort(dim=-1, descending=True).values
        worth = best[..., : options.scores_per_group(num_experts)].sum(-1)  # [T, G]
        groups = worth.sort(dim=-1, descending=True, stable=True).indices[:, : options.topk_group]
        allowed = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, groups, True)
        # an allowed expert goes before one that is not, also with a bias of -inf
        grouped = grouped.clamp_min(torch.finfo(torch.float32).min)
        scores = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).view(num_tokens, num_experts)

    ids = _topk_lowest_id_first(scores, top_k)  # [T, K]
    weights = probs.gather(1, ids)
    if vision_mask is not None and (vision_top_k < top_k or options.vision_experts is not None):
        is_vision = vision_mask.unsqueeze(1)
        inactive = is_vision & (torch.arange(top_k, device=logits.device) >= vision_top_k)
        original = weights.sum(-1, keepdim=True)
        if options.vision_experts is not None:
            # an expert to choose goes before one that is not, also with a bias of -inf
            scores = scores.clamp_min(torch.finfo(torch.float32).min)
            scores = scores.masked_fill(is_vision & ~options.vision_experts, float("-inf"))
            ids = _topk_lowest_id_first(scores, top_k)
            weights = probs.gather(1, ids)
            inactive |= scores.gather(1, ids) == float("-inf")
        reduced = weights.masked_fill(inactive, 0.0)
        if options.renormalize and not options.norm_topk_prob:
            reduced *= original / reduced.sum(-1, keepdim=True).clamp_min(1e-20)
        weights = torch.where(is_vision, reduced, weights)
        ids = ids.masked_fill(inactive, num_experts)
    if options.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    if options.skip_below is not None:
        text, vision = options.skip_below.unbind()
        least = text if vision_mask is None else torch.where(vision_mask, vision, text).unsqueeze(1)
        skipped = weights < least
        if options.exempt_mask is not None:
            skipped &= ~options.exempt_mask.unsqueeze(1)
        ids = ids.masked_fill(skipped, num_experts)
    weights = weights * options.routed_scaling_factor
    if padding_mask is not None:
        ids = ids.masked_fill(padding_mask.unsqueeze(1), num_experts)
    if vision_mask is not None or padding_mask is not None or options.skip_below is not None:
        # last, and by selection: NaN would have spread to slots that were 0
        weights = weights.masked_fill(ids == num_experts, 0.0)
    return ids.to(torch.int32), weights, probs if options.return_probs else probs.new_empty(0)


def gate_routing_reference(
    hidden: torch.Tensor,  # [T, H]
    weight: torch.Tensor,  # [E, H]
    bias: torch.Tensor | None,  # [E]
    logit_scale: float,
    options: RoutingOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gate's logits, and `topk_routing_reference` of them."""
    logits = F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())  # [T, E]
    logits *= logit_scale
    return logits, *topk_routing_reference(logits, options)


def _topk_lowest_id_first(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest per row, by falling score; ties go to the lower index (torch.topk promises no order)."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
