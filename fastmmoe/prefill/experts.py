"""Experts that run on the choice of `routing.py`: by this package's grouped GEMMs, or the model's own, pair by pair.

Also `experts_implementation="fastmmoe"`, the grouped GEMMs behind transformers' ExpertsInterface.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fastmmoe_kernels import moe_experts

NAME = "fastmmoe"

# how transformers' experts modules describe what they compute, and what `moe_experts` computes of it
LAYOUT = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}


def fastmmoe_experts(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls under `experts_implementation="fastmmoe"`."""
    check_experts(experts)
    return run_experts(experts, hidden_states, top_k_index, top_k_weights, "auto")


def run_experts(
    experts: nn.Module,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    backend: str,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> torch.Tensor:
    """Run `moe_experts` on a transformers experts module: [T, H], [T, K], [T, K] -> [T, H]; ids >= E are skipped."""
    gate_up = experts.gate_up_proj if getattr(experts, "has_gate", True) else experts.up_proj
    projections = (gate_up, experts.down_proj)
    if getattr(experts, "is_transposed", False):
        projections = (projection.mT for projection in projections)
    return moe_experts(hidden, *projections, ids, weights, **options, backend=backend)


def run_pairs(
    experts: Callable[..., torch.Tensor],
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    num_experts: int,
    pairs: int,
) -> torch.Tensor:
    """Run a model's own experts on one row per token and active expert.

    Args:
        experts: (hidden [P, H], ids int64 [P, 1], weights [P, 1]) -> [P, H].
        hidden: [T, H].
        ids: int [T, K], inactive slots hold `num_experts`.
        weights: [T, K].
        pairs: how many slots are active; the host knows it from the layout, and need not wait for the device.

    Returns:
        [T, H] in hidden's dtype.
    """
    num_tokens, top_k = ids.shape
    active = (ids >= num_experts).flatten().byte().argsort(stable=True)[:pairs]  # [P]
    rows = experts(
        hidden[active // top_k], ids.flatten()[active].long().unsqueeze(1), weights.flatten()[active].unsqueeze(1)
    )
    slots = rows.new_zeros(num_tokens * top_k, rows.shape[1]).index_copy_(0, active, rows)
    return slots.view(num_tokens, top_k, -1).sum(1)


def check_experts(experts: nn.Module, options: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Refuse an experts module of which it is not known that `moe_experts` computes the same.

    Raises:
        ValueError: a class that does not go through transformers' experts interface, or computes something else in it
            (biases, transposed or interleaved weights, no gate, a norm or clamp of its own, an activation other than
            SiLU), or weights that are no plain floating tensors (quantized, sharded).
    """
    name = type(experts).__name__
    for attribute, wanted in LAYOUT.items():
        found = getattr(experts, attribute, None)
        if found is None:
            raise ValueError(f"experts: {name} does not say {attribute}, expected a class of the experts interface")
        if found != wanted:
            raise ValueError(f"experts: {name} has {attribute}={found}, expected {wanted}")
    if getattr(experts, "has_post_expert_norm", False):
        raise ValueError(f"experts: {name} has has_post_expert_norm=True, expected False")
    if not hasattr(type(experts).forward, "__wrapped__"):
        raise ValueError(f"experts: {name} has a forward of its own, expected that of the experts interface")
    if getattr(type(experts)._apply_gate, "__module__", None) != ALL_EXPERTS_FUNCTIONS.__module__:
        raise ValueError(f"experts: {name} combines gate and up in a way of its own (_apply_gate), expected SwiGLU")
    activation = getattr(experts, "act_fn", None)
    if activation is not F.silu and not isinstance(activation, nn.SiLU):
        if type(activation).__name__ != "SiLUActivation":
            raise ValueError(f"experts: {name} uses {type(activation).__name__}, expected SiLU")
    for attribute in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, attribute, None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 3 or not weight.is_floating_point():
            raise ValueError(f"experts: {name}.{attribute} is no floating [E, ..., ...] tensor (quantized experts?)")
        if type(weight) not in (torch.Tensor, nn.Parameter):
            raise ValueError(f"experts: {name}.{attribute} is a {type(weight).__name__}, expected a plain tensor")
    others = sorted(set(experts._parameters) - {"gate_up_proj", "down_proj"})
    if others:
        raise ValueError(f"experts: {name} has parameters {others} beside its projections, expected none")


ALL_EXPERTS_FUNCTIONS.register(NAME, fastmmoe_experts)
