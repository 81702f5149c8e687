"""Modality-dependent top-K routing: vision tokens activate fewer experts (paper section 3.2; method section 1)."""

from typing import NamedTuple

import torch

from fastmmoe_kernels.backend import resolve_backend
from fastmmoe_kernels.checks import FLOATS, check_float, check_tensor
from fastmmoe_kernels.library import register
from fastmmoe_kernels.routing.options import RoutingOptions
from fastmmoe_kernels.routing.reference import gate_routing_reference, topk_routing_reference


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
        logits: float32 [T, E], the gate's scores z, with bias and scale.
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
    skip_below: torch.Tensor | None = None,
    exempt_mask: torch.Tensor | None = None,
    vision_experts: torch.Tensor | None = None,
    scoring: str = "softmax",
    norm_topk_prob: bool = True,
    correction_bias: torch.Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_best: int | None = None,
    routed_scaling_factor: float = 1.0,
    renormalize: bool = True,
    return_probs: bool = False,
    backend: str = "auto",
) -> RoutingOutput:
    """Select each token's experts: `vision_top_k` for vision tokens, `top_k` for the others (method section 1).

    Everything is computed in float32. Ties go to the lower expert id.

    NaN is the largest score, as in torch.sort: its expert is chosen, its weight is NaN, and so are all weights that are
    divided by a sum with it. A softmax over NaN, over inf, or over nothing but -inf is NaN in all experts, of which the
    first K are chosen; the sigmoid of inf is 1. Whatever the logits are, active slots of a token hold different experts
    in 0..E-1, its inactive ones E and 0, and no token depends on another. Sums of weights count as 1e-20 at least, so
    that probabilities of 0 give weights of 0; denormal probabilities are inexact, or 0.

    Args:
        logits: float32, float16 or bfloat16 [T, E], the gate's raw scores z.
        top_k: experts per token, K, in 1..E.
        vision_mask: bool [T], true at vision tokens; None: no vision token.
        padding_mask: bool [T], true at padding, which activates no expert; None: no padding.
        vision_top_k: experts per vision token, in 1..K; None: K.
        skip_below: float32 [2], the least weights of text and of vision tokens, in front of the scaling factor: chosen
            experts with less are skipped, which leaves their slots inactive and the other weights as they are. A token
            may lose all of its experts; NaN, as a weight or in here, skips nothing. None: no expert is skipped.
        exempt_mask: bool [T], true at tokens that keep all of their experts; None: no token. For `skip_below`.
        vision_experts: bool [E], the experts that vision tokens choose among, as of `choose_experts`; slots for which
            none is left are inactive. None: among all. Not with groups.
        scoring: "softmax" or "sigmoid", how z becomes p.
        norm_topk_prob: divide the selected p by their sum.
        correction_bias: floating [E], added to p for the selection only; -inf puts an expert behind all others that
            may be selected.
        n_group, topk_group: only experts of the `topk_group` best of `n_group` equal groups may be selected.
        group_best: how many of a group's best scores are summed to what it is worth, 1 or 2; None: two with a
            `correction_bias` (as far as it has two), else one.
        routed_scaling_factor: multiplies the weights at the end.
        renormalize: with `norm_topk_prob=False`, rescale a reduced vision token's weights to the sum of its original
            top K, of all experts.
        return_probs: also return p.
        backend: "auto", "triton" or "torch".

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype, device or range; names the argument.
        RuntimeError: `backend="triton"` where Triton cannot run.
    """
    check_tensor("logits", logits, ("T", "E"), FLOATS)
    options = RoutingOptions(
        vision_mask, padding_mask, skip_below, exempt_mask, vision_experts, correction_bias, top_k,
        top_k if vision_top_k is None else vision_top_k, scoring, norm_topk_prob, n_group, topk_group, group_best,
        routed_scaling_factor, renormalize, return_probs,
    )  # fmt: skip
    options.check(*logits.shape, logits.device)
    ids, weights, probs = _topk_routing(logits, *options, resolve_backend(backend, logits))
    return RoutingOutput(ids, weights, probs if return_probs else None)


def gate_routing(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    top_k: int,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    vision_mask: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    vision_top_k: int | None = None,
    skip_below: torch.Tensor | None = None,
    exempt_mask: torch.Tensor | None = None,
    vision_experts: torch.Tensor | None = None,
    scoring: str = "softmax",
    norm_topk_prob: bool = True,
    correction_bias: torch.Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_best: int | None = None,
    routed_scaling_factor: float = 1.0,
    renormalize: bool = True,
    return_probs: bool = False,
    backend: str = "auto",
) -> GateOutput:
    """The gate's linear layer and `topk_routing` of its logits, in one kernel (method section 1).

    The logits are accumulated in float32 and never rounded to the type of the tokens: float16 does not overflow.

    NaN and infinity in a token are in its own logits alone, in an expert's row of `weight` or in its `bias` in that
    expert's logits of all tokens; `topk_routing` says what becomes of them. The logits of a token of zeros tie, unless
    there is a bias: its experts are the first K.

    Args:
        hidden: float32, float16 or bfloat16 [T, H], the gate's input x.
        weight: [E, H] of the same dtype, the gate's weight W_g.
        bias: floating [E], the gate's own b, part of the logits (a `correction_bias` is not): z = (x W_g^T + b) scale.
        logit_scale: multiplies the logits, > 0.
        others: as in `topk_routing`.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype, device or range; names the argument.
        RuntimeError: `backend="triton"` where Triton cannot run.
    """
    check_tensor("hidden", hidden, ("T", "H"), FLOATS)
    check_tensor("weight", weight, ("E", hidden.shape[1]), (hidden.dtype,), hidden.device)
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), FLOATS, hidden.device)
    check_float("logit_scale", logit_scale, 0.0, float("inf"), low_open=True)
    options = RoutingOptions(
        vision_mask, padding_mask, skip_below, exempt_mask, vision_experts, correction_bias, top_k,
        top_k if vision_top_k is None else vision_top_k, scoring, norm_topk_prob, n_group, topk_group, group_best,
        routed_scaling_factor, renormalize, return_probs,
    )  # fmt: skip
    options.check(hidden.shape[0], weight.shape[0], hidden.device)
    backend = resolve_backend(backend, hidden)
    logits, ids, weights, probs = _gate_routing(hidden, weight, bias, logit_scale, *options, backend)
    return GateOutput(logits, ids, weights, probs if return_probs else None)


def _fake_topk(logits, options):
    return _fake_outputs(logits, *logits.shape, options)


def _fake_gate(hidden, weight, bias, logit_scale, options):
    num_tokens, num_experts = hidden.shape[0], weight.shape[0]
    logits = hidden.new_empty(num_tokens, num_experts, dtype=torch.float32)
    return logits, *_fake_outputs(hidden, num_tokens, num_experts, options)


def _fake_outputs(like, num_tokens, num_experts, options):
    return (
        like.new_empty(num_tokens, options.top_k, dtype=torch.int32),
        like.new_empty(num_tokens, options.top_k, dtype=torch.float32),
        like.new_empty((num_tokens, num_experts) if options.return_probs else 0, dtype=torch.float32),
    )


_topk_routing = register(
    "topk_routing", topk_routing_reference, "fastmmoe_kernels.routing.kernel:topk_routing_triton", _fake_topk
)
_gate_routing = register(
    "gate_routing", gate_routing_reference, "fastmmoe_kernels.routing.kernel:gate_routing_triton", _fake_gate
)
