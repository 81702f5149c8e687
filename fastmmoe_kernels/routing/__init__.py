"""Modality-dependent top-K routing: vision tokens activate fewer experts (paper section 3.2; method section 1)."""

from typing import NamedTuple

import torch

from fastmmoe_kernels.backend import resolve_backend
from fastmmoe_kernels.checks import FLOATS, check_choice, check_float, check_int, check_tensor
from fastmmoe_kernels.library import register
from fastmmoe_kernels.routing.reference import gate_routing_reference, topk_routing_reference

SCORINGS = ("softmax", "sigmoid")


class RoutingOutput(NamedTuple):
    """What a router decided, for T tokens, E experts and K slots per token.

    Attributes:
        ids: int32 [T, K], experts by falling selection score; inactive slots hold E.
        weights: float32 [T, K]; inactive slots hold 0.
        probs: float32 [T, E], the gate's probabilities (softmax) or scores (sigmoid); None unless asked for.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    probs: torch.Tensor | None


class GateOutput(NamedTuple):
    """What a gate decided, for T tokens, E experts and K slots per token.

    Attributes:
        logits: float32 [T, E], the gate's raw scores z.
        ids, weights, probs: as in `RoutingOutput`.
    """

    logits: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    probs: torch.Tensor | None


def topk_routing(
    logits: torch.Tensor,
    top_k: int,
    *,
    vision_mask: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    vision_top_k: int | None = None,
    scoring: str = "softmax",
    norm_topk_prob: bool = True,
    correction_bias: torch.Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    routed_scaling_factor: float = 1.0,
    renormalize: bool = True,
    return_probs: bool = False,
    backend: str = "auto",
) -> RoutingOutput:
    """Select each token's experts: `vision_top_k` for vision tokens, `top_k` for the others (method section 1).

    Everything is computed in float32. Ties go to the lower expert id.

    Args:
        logits: float32, float16 or bfloat16 [T, E], the gate's raw scores z.
        top_k: experts per token, K, in 1..E.
        vision_mask: bool [T], true at vision tokens; None: no vision token.
        padding_mask: bool [T], true at padding, which activates no expert; None: no padding.
        vision_top_k: experts per vision token, in 1..K; None: K.
        scoring: "softmax" or "sigmoid", how z becomes p.
        norm_topk_prob: divide the selected p by their sum.
        correction_bias: floating [E], added to p for the selection only.
        n_group, topk_group: only experts of the `topk_group` best of `n_group` equal groups may be selected. A group
            is worth the sum of its two best scores with a `correction_bias`, else its best score.
        routed_scaling_factor: multiplies the weights at the end.
        renormalize: with `norm_topk_prob=False`, rescale a reduced vision token's weights to the sum of its original
            top K.
        return_probs: also return p.
        backend: "auto", "triton" or "torch".

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype, device or range; names the argument.
        RuntimeError: `backend="triton"` where Triton cannot run.
    """
    check_tensor("logits", logits, ("T", "E"), FLOATS)
    arguments = _check_routing(
        *logits.shape, logits.device, top_k, vision_mask, padding_mask, vision_top_k, scoring, norm_topk_prob,
        correction_bias, n_group, topk_group, routed_scaling_factor, renormalize, return_probs,
    )  # fmt: skip
    ids, weights, probs = _topk_routing(logits, *arguments, resolve_backend(backend, logits))
    return RoutingOutput(ids, weights, probs if return_probs else None)


def gate_routing(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    top_k: int,
    *,
    vision_mask: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    vision_top_k: int | None = None,
    scoring: str = "softmax",
    norm_topk_prob: bool = True,
    correction_bias: torch.Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    routed_scaling_factor: float = 1.0,
    renormalize: bool = True,
    return_probs: bool = False,
    backend: str = "auto",
) -> GateOutput:
    """The gate's linear layer and `topk_routing` of its logits, in one kernel (method section 1).

    The logits are accumulated in float32 and never rounded to the type of the tokens.

    Args:
        hidden: float32, float16 or bfloat16 [T, H], the gate's input x.
        weight: [E, H] of the same dtype, the gate's weight W_g: z = x W_g^T.
        others: as in `topk_routing`.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype, device or range; names the argument.
        RuntimeError: `backend="triton"` where Triton cannot run.
    """
    check_tensor("hidden", hidden, ("T", "H"), FLOATS)
    check_tensor("weight", weight, ("E", hidden.shape[1]), (hidden.dtype,), hidden.device)
    arguments = _check_routing(
        hidden.shape[0], weight.shape[0], hidden.device, top_k, vision_mask, padding_mask, vision_top_k, scoring,
        norm_topk_prob, correction_bias, n_group, topk_group, routed_scaling_factor, renormalize, return_probs,
    )  # fmt: skip
    logits, ids, weights, probs = _gate_routing(hidden, weight, *arguments, resolve_backend(backend, hidden))
    return GateOutput(logits, ids, weights, probs if return_probs else None)


def _check_routing(
    num_tokens: int,
    num_experts: int,
    device: torch.device,
    top_k: int,
    vision_mask: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    vision_top_k: int | None,
    scoring: str,
    norm_topk_prob: bool,
    correction_bias: torch.Tensor | None,
    n_group: int,
    topk_group: int,
    routed_scaling_factor: float,
    renormalize: bool,
    return_probs: bool,
) -> tuple:
    """Check what both ops take; returns it as their custom ops take it, up to the backend."""
    check_int("top_k", top_k, 1, num_experts)
    for name, mask in (("vision_mask", vision_mask), ("padding_mask", padding_mask)):
        if mask is not None:
            check_tensor(name, mask, (num_tokens,), (torch.bool,), device)
    if vision_top_k is not None:
        check_int("vision_top_k", vision_top_k, 1, top_k)
        if vision_mask is None and vision_top_k < top_k:
            raise ValueError(f"vision_mask: expected a mask with vision_top_k={vision_top_k}, got None")
    check_choice("scoring", scoring, SCORINGS)
    if correction_bias is not None:
        check_tensor("correction_bias", correction_bias, (num_experts,), FLOATS, device)
    check_int("n_group", n_group, 1, num_experts)
    if num_experts % n_group:
        raise ValueError(f"n_group: expected a divisor of the {num_experts} experts, got {n_group}")
    check_int("topk_group", topk_group, 1, n_group)
    if topk_group * (num_experts // n_group) < top_k:
        raise ValueError(
            f"topk_group: {topk_group} groups of {num_experts // n_group} experts hold fewer than top_k={top_k}"
        )
    check_float("routed_scaling_factor", routed_scaling_factor, 0.0, float("inf"), low_open=True)
    return (
        vision_mask,
        padding_mask,
        correction_bias,
        top_k,
        top_k if vision_top_k is None else vision_top_k,
        scoring,
        norm_topk_prob,
        n_group,
        topk_group,
        float(routed_scaling_factor),
        renormalize,
        return_probs,
    )


def _run_topk(
    logits: torch.Tensor,
    vision_mask: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    correction_bias: torch.Tensor | None,
    top_k: int,
    vision_top_k: int,
    scoring: str,
    norm_topk_prob: bool,
    n_group: int,
    topk_group: int,
    routed_scaling_factor: float,
    renormalize: bool,
    return_probs: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if backend == "triton":
        from fastmmoe_kernels.routing.kernel import topk_routing_triton as run
    else:
        run = topk_routing_reference
    return run(
        logits,
        vision_mask,
        padding_mask,
        correction_bias,
        top_k,
        vision_top_k,
        scoring,
        norm_topk_prob,
        n_group,
        topk_group,
        routed_scaling_factor,
        renormalize,
        return_probs,
    )


def _fake_topk(logits, vision_mask, padding_mask, correction_bias, top_k, vision_top_k, scoring, norm_topk_prob,
               n_group, topk_group, routed_scaling_factor, renormalize, return_probs, backend):  # fmt: skip
    return _fake_outputs(logits, *logits.shape, top_k, return_probs)


def _run_gate(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    vision_mask: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    correction_bias: torch.Tensor | None,
    top_k: int,
    vision_top_k: int,
    scoring: str,
    norm_topk_prob: bool,
    n_group: int,
    topk_group: int,
    routed_scaling_factor: float,
    renormalize: bool,
    return_probs: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if backend == "triton":
        from fastmmoe_kernels.routing.kernel import gate_routing_triton as run
    else:
        run = gate_routing_reference
    return run(
        hidden,
        weight,
        vision_mask,
        padding_mask,
        correction_bias,
        top_k,
        vision_top_k,
        scoring,
        norm_topk_prob,
        n_group,
        topk_group,
        routed_scaling_factor,
        renormalize,
        return_probs,
    )


def _fake_gate(hidden, weight, vision_mask, padding_mask, correction_bias, top_k, vision_top_k, scoring, norm_topk_prob,
               n_group, topk_group, routed_scaling_factor, renormalize, return_probs, backend):  # fmt: skip
    num_tokens, num_experts = hidden.shape[0], weight.shape[0]
    logits = hidden.new_empty(num_tokens, num_experts, dtype=torch.float32)
    return logits, *_fake_outputs(hidden, num_tokens, num_experts, top_k, return_probs)


def _fake_outputs(like, num_tokens, num_experts, top_k, return_probs):
    return (
        like.new_empty(num_tokens, top_k, dtype=torch.int32),
        like.new_empty(num_tokens, top_k, dtype=torch.float32),
        like.new_empty((num_tokens, num_experts) if return_probs else 0, dtype=torch.float32),
    )


_topk_routing = register("topk_routing", _run_topk, _fake_topk)
_gate_routing = register("gate_routing", _run_gate, _fake_gate)
