"""Modality-dependent top-K routing in Triton, from the logits or from the gate's input, in one kernel each.

A program has a block of tokens and all experts, in registers. Both kernels share everything after the logits.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from fastmmoe_kernels.grid import cdiv
from fastmmoe_kernels.routing.options import RoutingOptions
from fastmmoe_kernels.variant import KernelVariant

INF = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # of what is not taken yet


@triton.jit
def _best_first(scores, index, BLOCK: tl.constexpr):
    """Per row, the largest score and its index; ties go to the lower index."""
    best = tl.max(scores, axis=1)
    return best, tl.min(tl.where(scores == best[:, None], index, BLOCK), axis=1)


@triton.jit
def _sum_of_best(scores, probs, expert, K: tl.constexpr, BLOCK_E: tl.constexpr):
    """Per row, the sum of the probabilities of the K experts with the largest scores."""
    total = tl.zeros((scores.shape[0],), tl.float32)
    for _ in tl.static_range(K):
        _, chosen = _best_first(scores, expert, BLOCK_E)
        is_chosen = expert == chosen[:, None]
        total += tl.sum(tl.where(is_chosen, probs, 0.0), axis=1)
        scores = tl.where(is_chosen, float("-inf"), scores)
    return total


@triton.jit
def _mask_groups(
    scores,  # [BT, BE]
    expert,  # [1, BE]
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Set the scores of experts outside the best groups to -inf."""
    group = tl.arange(0, BLOCK_G)[None, :]
    worth = tl.full((scores.shape[0], BLOCK_G), float("-inf"), tl.float32)  # [BT, BG]
    for g in tl.static_range(N_GROUP):
        inside = tl.where(expert // GROUP_SIZE == g, scores, float("-inf"))
        best, first = _best_first(inside, expert, BLOCK_E)
        if GROUP_BEST == 2:
            best += tl.max(tl.where(expert == first[:, None], float("-inf"), inside), axis=1)
            best = tl.maximum(best, LOWEST)
        worth = tl.where(group == g, best[:, None], worth)
    allowed = tl.zeros(scores.shape, tl.int32)
    for _ in tl.static_range(TOPK_GROUP):
        _, chosen = _best_first(worth, group, BLOCK_G)
        worth = tl.where(group == chosen[:, None], float("-inf"), worth)
        allowed = tl.where(expert // GROUP_SIZE == chosen[:, None], 1, allowed)
    return tl.where(allowed != 0, scores, float("-inf"))


@triton.jit
def _route(
    z,  # [BT, BE], float32; anything in columns past E
    row,  # [BT]
    in_rows,  # [BT]
    vision_ptr,
    padding_ptr,
    skip_ptr,
    exempt_ptr,
    allowed_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    probs_ptr,
    scaling,
    E: tl.constexpr,
    K: tl.constexpr,
    K_VISION: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_VISION: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    SKIPS: tl.constexpr,
    HAS_EXEMPT: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_PROBS: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """From the logits of a block of tokens to their rows of the outputs."""
    expert = tl.arange(0, BLOCK_E)[None, :]  # [1, BE]
    if SIGMOID:
        probs = 1.0 / (1.0 + tl.exp(-z))
    else:
        z = tl.where(expert < E, z, float("-inf"))
        exp = tl.exp(z - tl.max(z, axis=1)[:, None])
        probs = exp / tl.sum(exp, axis=1)[:, None]
    if STORE_PROBS:
        tl.store(probs_ptr + row[:, None] * E + expert, probs, mask=in_rows[:, None] & (expert < E))
    scores = probs
    if HAS_BIAS:
        scores += tl.load(bias_ptr + expert, mask=expert < E, other=0.0).to(tl.float32)
        scores = tl.where(scores < LOWEST, LOWEST, scores)
    # a maximum passes over NaN, which equals nothing: as inf it is the largest, and found
    scores = tl.where(scores == scores, scores, INF)
    scores = tl.where(expert < E, scores, float("-inf"))
    if N_GROUP > 1:
        scores = _mask_groups(scores, expert, N_GROUP, TOPK_GROUP, E // N_GROUP, GROUP_BEST, BLOCK_G, BLOCK_E)

    if HAS_VISION:
        is_vision = tl.load(vision_ptr + row, mask=in_rows, other=0) != 0
    if HAS_ALLOWED:
        if RENORMALIZE and not NORMALIZE:
            original = _sum_of_best(scores, probs, expert, K, BLOCK_E)
        is_allowed = tl.load(allowed_ptr + expert, mask=expert < E, other=0) != 0  # [1, BE]
        scores = tl.where(is_vision[:, None] & (is_allowed == 0), float("-inf"), scores)

    slot = tl.arange(0, BLOCK_K)[None, :]  # [1, BK]
    ids = tl.full((BLOCK_T, BLOCK_K), E, tl.int32)
    weights = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for k in tl.static_range(K):
        weight, chosen = _best_first(scores, expert, BLOCK_E)  # [BT]
        is_chosen = expert == chosen[:, None]
        if HAS_BIAS:  # otherwise an expert's score is its probability
            weight = tl.sum(tl.where(is_chosen, probs, 0.0), axis=1)
        if HAS_ALLOWED:
            is_none = tl.max(scores, axis=1) == float("-inf")
            weight = tl.where(is_none, 0.0, weight)
            chosen = tl.where(is_none, E, chosen)
        scores = tl.where(is_chosen, float("-inf"), scores)
        ids = tl.where(slot == k, chosen[:, None], ids)
        weights = tl.where(slot == k, weight[:, None], weights)

    if not HAS_BIAS:
        weights = tl.where(weights == INF, float("nan"), weights)  # no probability is infinite
    if K_VISION < K or HAS_ALLOWED:
        inactive = is_vision[:, None] & (slot >= K_VISION)
        reduced = tl.where(inactive, 0.0, weights)
        if RENORMALIZE and not NORMALIZE:
            kept = tl.maximum(tl.sum(reduced, axis=1), 1e-20, propagate_nan=tl.PropagateNan.ALL)
            scale = (original if HAS_ALLOWED else tl.sum(weights, axis=1)) / kept
            reduced *= scale[:, None]
        weights = tl.where(is_vision[:, None], reduced, weights)
        ids = tl.where(inactive, E, ids)
    if NORMALIZE:
        weights /= tl.maximum(tl.sum(weights, axis=1), 1e-20, propagate_nan=tl.PropagateNan.ALL)[:, None]
    if SKIPS:
        least = tl.load(skip_ptr) + tl.zeros((BLOCK_T,), tl.float32)
        if HAS_VISION:
            least = tl.where(is_vision, tl.load(skip_ptr + 1), least)
        is_skipped = weights < least[:, None]
        if HAS_EXEMPT:
            is_skipped &= (tl.load(exempt_ptr + row, mask=in_rows, other=0) == 0)[:, None]
        ids = tl.where(is_skipped, E, ids)
    weights *= scaling
    if HAS_PADDING:
        is_padding = (tl.load(padding_ptr + row, mask=in_rows, other=0) != 0)[:, None]
        ids = tl.where(is_padding, E, ids)
    if HAS_PADDING or SKIPS or HAS_ALLOWED or K_VISION < K:
        # last, and by selection: NaN would have spread to slots that were 0
        weights = tl.where(ids == E, 0.0, weights)

    stored = in_rows[:, None] & (slot < K)
    tl.store(ids_ptr + row[:, None] * K + slot, ids, mask=stored)
    tl.store(weights_ptr + row[:, None] * K + slot, weights, mask=stored)


@triton.jit(do_not_specialize=["num_tokens"])
def topk_routing_kernel(
    logits_ptr,  # [T, E]
    vision_ptr,  # [T] or unused
    padding_ptr,  # [T] or unused
    skip_ptr,  # [2] or unused
    exempt_ptr,  # [T] or unused
    allowed_ptr,  # [E] or unused
    bias_ptr,  # [E] or unused
    ids_ptr,  # [T, K]
    weights_ptr,  # [T, K]
    probs_ptr,  # [T, E] or unused
    num_tokens,
    stride_token,
    stride_expert,
    scaling,
    E: tl.constexpr,
    K: tl.constexpr,
    K_VISION: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_VISION: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    SKIPS: tl.constexpr,
    HAS_EXEMPT: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_PROBS: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BT]
    expert = tl.arange(0, BLOCK_E)[None, :]  # [1, BE]
    in_rows = row < num_tokens
    inside = in_rows[:, None] & (expert < E)
    z = tl.load(logits_ptr + row[:, None] * stride_token + expert * stride_expert, mask=inside, other=0.0)
    _route(
        z.to(tl.float32), row, in_rows, vision_ptr, padding_ptr, skip_ptr, exempt_ptr, allowed_ptr, bias_ptr, ids_ptr,
        weights_ptr, probs_ptr, scaling, E, K, K_VISION, SIGMOID, NORMALIZE, RENORMALIZE, HAS_VISION, HAS_PADDING,
        SKIPS, HAS_EXEMPT, HAS_ALLOWED, HAS_BIAS, STORE_PROBS, N_GROUP, TOPK_GROUP, GROUP_BEST, BLOCK_T, BLOCK_E,
        BLOCK_G, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def gate_routing_kernel(
    hidden_ptr,  # [T, H]
    weight_ptr,  # [E, H]
    logit_bias_ptr,  # [E] or unused
    logits_ptr,  # [T, E]
    vision_ptr,  # [T] or unused
    padding_ptr,  # [T] or unused
    skip_ptr,  # [2] or unused
    exempt_ptr,  # [T] or unused
    allowed_ptr,  # [E] or unused
    bias_ptr,  # [E] or unused
    ids_ptr,  # [T, K]
    weights_ptr,  # [T, K]
    probs_ptr,  # [T, E] or unused
    num_tokens,
    stride_token,
    scaling,
    H: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    K_VISION: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_VISION: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    SKIPS: tl.constexpr,
    HAS_EXEMPT: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_PROBS: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    HAS_LOGIT_BIAS: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BT]
    expert = tl.arange(0, BLOCK_E)  # [BE]
    in_rows = row < num_tokens
    inner = tl.arange(0, BLOCK_H)  # [BH]
    # rows past the end read the last row again, and experts past E the last expert: no mask in the loop
    x_ptrs = hidden_ptr + tl.minimum(row, num_tokens - 1)[:, None] * stride_token + inner[None, :]
    read = tl.minimum(expert, E - 1) if E < BLOCK_E else expert
    weight_ptrs = weight_ptr + read.to(tl.int64)[None, :] * H + inner[:, None]
    z = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if HAS_LOGIT_BIAS:
        z += tl.load(logit_bias_ptr + expert, mask=expert < E, other=0.0).to(tl.float32)[None, :]
    for h in range(0, H, BLOCK_H):
        if H % BLOCK_H:
            x = tl.load(x_ptrs, mask=inner[None, :] < H - h, other=0.0)
            weight = tl.load(weight_ptrs, mask=inner[:, None] < H - h, other=0.0)
        else:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        z = tl.dot(x, weight, z, input_precision="ieee")
        x_ptrs += BLOCK_H
        weight_ptrs += BLOCK_H
    if LOGIT_SCALE != 1.0:
        z *= LOGIT_SCALE
    tl.store(logits_ptr + row[:, None] * E + expert[None, :], z, mask=in_rows[:, None] & (expert < E)[None, :])
    _route(
        z, row, in_rows, vision_ptr, padding_ptr, skip_ptr, exempt_ptr, allowed_ptr, bias_ptr, ids_ptr, weights_ptr,
        probs_ptr, scaling, E, K, K_VISION, SIGMOID, NORMALIZE, RENORMALIZE, HAS_VISION, HAS_PADDING, SKIPS, HAS_EXEMPT,
        HAS_ALLOWED, HAS_BIAS, STORE_PROBS, N_GROUP, TOPK_GROUP, GROUP_BEST, BLOCK_T, BLOCK_E, BLOCK_G, BLOCK_K,
    )  # fmt: skip


@cache
def routing_blocks(num_experts: int, top_k: int, n_group: int, restricts: bool) -> dict[str, int]:
    """Block sizes: about 1,024 scores per program (4,096 spill registers from 72 experts on), at least one token.

    Where vision tokens choose among some experts, half as many: they may be chosen from twice.
    """
    block_e = triton.next_power_of_2(num_experts)
    return {
        "BLOCK_T": max(1, (512 if restricts else 1024) // block_e),
        "BLOCK_E": block_e,
        "BLOCK_G": triton.next_power_of_2(n_group),
        "BLOCK_K": triton.next_power_of_2(top_k),
    }


@cache
def gate_blocks(num_experts: int, top_k: int, n_group: int, has_bias: bool, itemsize: int) -> dict[str, int]:
    """Block sizes, warps and stages: 64 tokens per program, which wgmma needs, as long as nothing spills.

    Every program reads all weights, so that fewer tokens would not make it much faster, only more programs. The same on
    all targets, for the 64 KiB of gfx942: three stages up to 256 experts, two with blocks twice as deep above, because
    shallower blocks of tokens would be too few bytes per thread for asynchronous copies.
    """
    block_e = max(16, triton.next_power_of_2(num_experts))  # tl.dot takes 16 columns or more
    # with a bias, scores and probabilities are in registers at once; float32 has no tensor cores at full precision
    scores = 4096 if itemsize == 4 else 8192 if has_bias else 16384
    weights = 4096 if itemsize == 4 else 16384 if block_e > 256 else 8192
    return {
        "BLOCK_T": min(64, max(16, scores // block_e)),
        "BLOCK_H": max(16, min(32 if itemsize == 4 else 64, weights // block_e)),
        "BLOCK_E": block_e,
        "BLOCK_G": triton.next_power_of_2(n_group),
        "BLOCK_K": triton.next_power_of_2(top_k),
        # with 8 warps, Triton 3.6 spills float32 and 256 experts on sm_100
        "num_warps": 16 if itemsize == 4 and block_e > 128 else 8 if block_e > 64 else 4,
        "num_stages": 2 if itemsize == 4 or block_e > 256 else 3,
    }


def topk_routing_triton(
    logits: torch.Tensor,  # [T, E]
    options: RoutingOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, num_experts = logits.shape
    outputs, arguments = _outputs_and_arguments(logits, options)
    if num_tokens > 0:
        restricts = options.vision_experts is not None
        blocks = routing_blocks(num_experts, options.top_k, options.n_group, restricts)
        topk_routing_kernel[(cdiv(num_tokens, blocks["BLOCK_T"]),)](
            stride_token=logits.stride(0), stride_expert=logits.stride(1), **arguments, **blocks
        )
    return outputs


def gate_routing_triton(
    hidden: torch.Tensor,  # [T, H]
    weight: torch.Tensor,  # [E, H]
    bias: torch.Tensor | None,  # [E]
    logit_scale: float,
    options: RoutingOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (num_tokens, width), num_experts = hidden.shape, weight.shape[0]
    logits = hidden.new_empty(num_tokens, num_experts, dtype=torch.float32)
    outputs, arguments = _outputs_and_arguments(logits, options)
    if num_tokens > 0:
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        has_bias = options.correction_bias is not None
        blocks = gate_blocks(num_experts, options.top_k, options.n_group, has_bias, hidden.itemsize)
        gate_routing_kernel[(cdiv(num_tokens, blocks["BLOCK_T"]),)](
            hidden, weight.contiguous(), bias.contiguous() if bias is not None else logits,
            stride_token=hidden.stride(0), H=width, HAS_LOGIT_BIAS=bias is not None, LOGIT_SCALE=logit_scale,
            **arguments, **blocks,
        )  # fmt: skip
    return logits, *outputs


def _outputs_and_arguments(
    logits: torch.Tensor,  # [T, E]
    options: RoutingOptions,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], dict]:
    """Empty ids, weights and probs, and the arguments that both kernels take."""
    num_tokens, num_experts = logits.shape
    vision_mask, padding_mask, bias = options.vision_mask, options.padding_mask, options.correction_bias
    skip_below, exempt_mask, allowed = options.skip_below, options.exempt_mask, options.vision_experts
    ids = logits.new_empty(num_tokens, options.top_k, dtype=torch.int32)
    weights = logits.new_empty(num_tokens, options.top_k, dtype=torch.float32)
    probs = logits.new_empty((num_tokens, num_experts) if options.return_probs else 0, dtype=torch.float32)
    arguments = {
        "logits_ptr": logits,
        "vision_ptr": vision_mask.contiguous() if vision_mask is not None else logits,
        "padding_ptr": padding_mask.contiguous() if padding_mask is not None else logits,
        "skip_ptr": skip_below.contiguous() if skip_below is not None else logits,
        "exempt_ptr": exempt_mask.contiguous() if exempt_mask is not None else logits,
        "allowed_ptr": allowed.contiguous() if allowed is not None else logits,
        "bias_ptr": bias.contiguous() if bias is not None else logits,
        "ids_ptr": ids,
        "weights_ptr": weights,
        "probs_ptr": probs,
        "num_tokens": num_tokens,
        "scaling": options.routed_scaling_factor,
        "E": num_experts,
        "K": options.top_k,
        "K_VISION": options.vision_top_k if vision_mask is not None else options.top_k,
        "SIGMOID": options.scoring == "sigmoid",
        "NORMALIZE": options.norm_topk_prob,
        "RENORMALIZE": options.renormalize,
        "HAS_VISION": vision_mask is not None,
        "HAS_PADDING": padding_mask is not None,
        "SKIPS": skip_below is not None,
        "HAS_EXEMPT": exempt_mask is not None,
        "HAS_ALLOWED": allowed is not None,
        "HAS_BIAS": bias is not None,
        "STORE_PROBS": options.return_probs,
        "N_GROUP": options.n_group,
        "TOPK_GROUP": options.topk_group,
        "GROUP_BEST": options.scores_per_group(num_experts),
    }
    return (ids, weights, probs), arguments


@dataclass(frozen=True)
class _Gate:
    """A model's gate, for `aot_variants`; one that is not complete is compiled from the tokens, in bfloat16, alone."""

    num_experts: int
    width: int
    top_k: int
    sigmoid: bool = False
    normalize: bool = True
    has_bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    has_logit_bias: bool = False
    is_complete: bool = True


GATES = [
    _Gate(128, 2048, 8),  # Qwen3-MoE (InternVL3.5, Qwen3-VL)
    _Gate(64, 2048, 6, normalize=False),  # DeepSeek-VL2 Small
    _Gate(72, 2560, 6, sigmoid=True, has_bias=True),  # DeepSeek-VL2
    _Gate(256, 7168, 8, sigmoid=True, has_bias=True, n_group=8, topk_group=4),  # DeepSeek-V3
    _Gate(32, 2880, 4, has_logit_bias=True, is_complete=False),  # gpt-oss-20b
    _Gate(384, 7168, 8, sigmoid=True, has_bias=True, is_complete=False),  # Kimi-K2.5
]
@dataclass(frozen=True)
class _Launch:
    """What a launch is given, for `aot_variants`: the type of its input, and which of the options."""

    kernel: object
    dtype: str
    reduced: bool = True  # vision tokens take fewer experts
    padding: bool = False
    probs: bool = False
    skips: bool = False
    restricts: bool = False  # vision tokens choose among some


LAUNCHES = [
    _Launch(topk_routing_kernel, "*fp32", reduced=False),
    _Launch(topk_routing_kernel, "*fp32"),
    _Launch(topk_routing_kernel, "*fp32", probs=True),
    _Launch(topk_routing_kernel, "*fp32", padding=True, probs=True),
    _Launch(topk_routing_kernel, "*fp32", padding=True, probs=True, skips=True),
    _Launch(topk_routing_kernel, "*fp32", restricts=True),
    _Launch(topk_routing_kernel, "*fp32", padding=True, skips=True, restricts=True),
    _Launch(topk_routing_kernel, "*bf16"),
    _Launch(topk_routing_kernel, "*fp16"),
    _Launch(gate_routing_kernel, "*bf16"),
    _Launch(gate_routing_kernel, "*bf16", probs=True),
    _Launch(gate_routing_kernel, "*bf16", padding=True),
    _Launch(gate_routing_kernel, "*bf16", padding=True, probs=True),
    _Launch(gate_routing_kernel, "*bf16", reduced=False, skips=True),  # decoding
    _Launch(gate_routing_kernel, "*bf16", padding=True, probs=True, skips=True),
    _Launch(gate_routing_kernel, "*fp16", padding=True, probs=True),
    _Launch(gate_routing_kernel, "*fp32", padding=True, probs=True),
    _Launch(gate_routing_kernel, "*fp32", padding=True, probs=True, skips=True),
]


def aot_variants() -> list[KernelVariant]:
    """Every shipped configuration, for `python -m fastmmoe_kernels.aot`."""
    variants = []
    for gate in GATES:
        for launch in LAUNCHES:
            dtype, reduced, padding, skips = launch.dtype, launch.reduced, launch.padding, launch.skips
            # groups compile slowly, and differ from the other gates in nothing else
            if gate.n_group > 1 and not launch.probs:
                continue
            from_hidden = launch.kernel is gate_routing_kernel
            if not gate.is_complete and not (from_hidden and dtype == "*bf16"):
                continue
            num_experts, top_k, n_group, has_bias = gate.num_experts, gate.top_k, gate.n_group, gate.has_bias
            logits = "*fp32" if from_hidden else dtype
            signature = {
                "logits_ptr": logits, "vision_ptr": "*u1" if reduced else logits,
                "padding_ptr": "*u1" if padding else logits, "skip_ptr": "*fp32" if skips else logits,
                "exempt_ptr": "*u1" if skips else logits, "allowed_ptr": "*u1" if launch.restricts else logits,
                "bias_ptr": "*fp32" if has_bias else logits, "ids_ptr": "*i32", "weights_ptr": "*fp32",
                "probs_ptr": "*fp32", "num_tokens": "i32", "stride_token": "i32", "scaling": "fp32",
            }  # fmt: skip
            constants = {
                "E": num_experts, "K": top_k, "K_VISION": top_k // 2 if reduced else top_k, "SIGMOID": gate.sigmoid,
                "NORMALIZE": gate.normalize, "RENORMALIZE": True, "HAS_VISION": reduced, "HAS_PADDING": padding,
                "SKIPS": skips, "HAS_EXEMPT": skips, "HAS_ALLOWED": launch.restricts, "HAS_BIAS": has_bias,
                "STORE_PROBS": launch.probs, "N_GROUP": n_group, "TOPK_GROUP": gate.topk_group,
                "GROUP_BEST": 2 if has_bias else 1,
            }  # fmt: skip
            if from_hidden:
                logit_bias = dtype if gate.has_logit_bias else logits
                signature = {"hidden_ptr": dtype, "weight_ptr": dtype, "logit_bias_ptr": logit_bias} | signature
                itemsize = 4 if dtype == "*fp32" else 2
                blocks = gate_blocks(num_experts, top_k, n_group, has_bias, itemsize)
                tokens = blocks["BLOCK_T"] * blocks["BLOCK_H"] * itemsize
                constants |= {"H": gate.width, "HAS_LOGIT_BIAS": gate.has_logit_bias, "LOGIT_SCALE": 1.0}
                variant = KernelVariant(
                    launch.kernel,
                    signature,
                    constants | {name: size for name, size in blocks.items() if name.isupper()},
                    num_warps=blocks["num_warps"],
                    num_stages=blocks["num_stages"],
                    is_gemm=True,
                    needs_wgmma=blocks["BLOCK_T"] >= 64,
                    load_bytes=min(16, max(4, tokens // (32 * blocks["num_warps"]))),
                )
            else:
                constants |= {"stride_expert": 1} | routing_blocks(num_experts, top_k, n_group, launch.restricts)
                unaligned = ("stride_token",) if num_experts % 16 else ()
                variant = KernelVariant(launch.kernel, signature, constants, unaligned=unaligned)
            variants.append(variant)
    return variants
