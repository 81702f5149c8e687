"""The expert budget in PyTorch: the definition, and the CPU path."""

import torch


def choose_experts_reference(
    ids: torch.Tensor,  # [T, K]
    weights: torch.Tensor,  # [T, K]
    vision_mask: torch.Tensor,  # [T]
    num_experts: int,
    budget: int,
) -> torch.Tensor:
    counts = vision_mask.unsqueeze(1) & (ids >= 0) & (ids < num_experts)
    asked = torch.where(counts, weights.float() ** 8, 0.0)  # [T, K]
    # a column more takes what counts for none; a token names no expert twice
    column = torch.where(counts, ids, num_experts).long()
    demand = asked.new_zeros(len(ids), num_experts + 1).scatter_(1, column, asked)[:, :num_experts].sum(0)  # [E]
    chosen = demand.sort(descending=True, stable=True).indices[:budget]
    return torch.zeros_like(demand, dtype=torch.bool).scatter_(0, chosen, True)
