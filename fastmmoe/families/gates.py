"""What gates of common kinds tell `topk_routing`."""

from typing import Any

from torch import nn


def softmax_gate(gate: nn.Module, *_: Any) -> dict[str, Any]:
    """Softmax over all experts; the chosen ones' shares are normalised unless the gate says otherwise."""
    return {"top_k": gate.top_k, "scoring": "softmax", "norm_topk_prob": getattr(gate, "norm_topk_prob", True)}


def sigmoid_gate(gate: nn.Module, *_: Any) -> dict[str, Any]:
    """Sigmoids with a correction bias for the choice, normalised."""
    return {
        "top_k": gate.top_k,
        "scoring": "sigmoid",
        "norm_topk_prob": getattr(gate, "norm_topk_prob", True),
        "correction_bias": gate.e_score_correction_bias,
        "routed_scaling_factor": float(getattr(gate, "routed_scaling_factor", 1.0)),
    }


def grouped_sigmoid_gate(gate: nn.Module, *_: Any) -> dict[str, Any]:
    """As `sigmoid_gate`, among the experts of the best groups."""
    return sigmoid_gate(gate) | {"n_group": gate.num_group, "topk_group": gate.topk_group}


def grouped_softmax_gate(gate: nn.Module, *_: Any) -> dict[str, Any]:
    """Softmax, among the experts of the groups whose two best ones have the largest sum; normalised and scaled."""
    options = softmax_gate(gate) | {"routed_scaling_factor": float(gate.routed_scaling_factor)}
    if gate.num_group > 1:
        options |= {"n_group": gate.num_group, "topk_group": gate.topk_group, "group_best": 2}
    return options


def unnormalised_softmax_gate(gate: nn.Module, *_: Any) -> dict[str, Any]:
    """Softmax whose chosen shares are scaled and not normalised, among the experts of the best groups if it has any."""
    is_grouped = gate.topk_method == "group_limited_greedy"
    return {
        "top_k": gate.top_k,
        "scoring": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": float(gate.routed_scaling_factor),
        "n_group": gate.num_group if is_grouped else 1,
        "topk_group": gate.topk_group if is_grouped else 1,
    }
