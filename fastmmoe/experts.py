"""`experts_implementation="fastmmoe"`: this package's grouped GEMMs behind transformers' ExpertsInterface."""

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fastmmoe_kernels import moe_experts

NAME = "fastmmoe"


def fastmmoe_experts(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls under `experts_implementation="fastmmoe"`."""
    check_experts(experts)
    return run_experts(experts, hidden_states, top_k_index, top_k_weights, "auto")


def run_experts(
    experts: nn.Module, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, backend: str
) -> torch.Tensor:
    """Run `moe_experts` on a transformers experts module: [T, H], [T, K], [T, K] -> [T, H]; ids >= E are skipped."""
    return moe_experts(hidden, experts.gate_up_proj, experts.down_proj, ids, weights, backend=backend)


def check_experts(experts: nn.Module) -> None:
    """Refuse an experts module that `moe_experts` does not compute.

    Raises:
        ValueError: biases, transposed or interleaved weights, no gate, an activation other than SiLU, or weights that
            are no plain floating tensors (quantized, sharded).
    """
    name = type(experts).__name__
    layout = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    for attribute, wanted in layout.items():
        if getattr(experts, attribute, wanted) != wanted:
            raise ValueError(f"experts: {name} has {attribute}={not wanted}, expected {wanted}")
    if not isinstance(experts.act_fn, nn.SiLU) and type(experts.act_fn).__name__ != "SiLUActivation":
        raise ValueError(f"experts: {name} uses {type(experts.act_fn).__name__}, expected SiLU")
    for attribute in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, attribute, None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 3 or not weight.is_floating_point():
            raise ValueError(f"experts: {name}.{attribute} is no floating [E, ..., ...] tensor (quantized experts?)")
        if type(weight) not in (torch.Tensor, nn.Parameter):
            raise ValueError(f"experts: {name}.{attribute} is a {type(weight).__name__}, expected a plain tensor")


ALL_EXPERTS_FUNCTIONS.register(NAME, fastmmoe_experts)
