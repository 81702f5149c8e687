"""Modality-dependent top-K routing as one Triton kernel: a block of tokens per program, all experts in registers."""

import torch
import triton
import triton.language as tl

from fastmmoe_kernels.variant import KernelVariant


@triton.jit
def _best_first(scores, index, BLOCK: tl.constexpr):
    """Per row, the largest score and its index; ties go to the lower index."""
    best = tl.max(scores, axis=1)
    return best, tl.min(tl.where(scores == best[:, None], index, BLOCK), axis=1)


@triton.jit
def _mask_groups(
    scores,  # [BT, BE]
    expert,  # [1, BE]
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SUM_OF_TWO: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Set the scores of experts outside the best groups to -inf."""
    group = tl.arange(0, BLOCK_G)[None, :]
    worth = tl.full((scores.shape[0], BLOCK_G), float("-inf"), tl.float32)  # [BT, BG]
    for g in tl.static_range(N_GROUP):
        inside = tl.where(expert // GROUP_SIZE == g, scores, float("-inf"))
        best, first = _best_first(inside, expert, BLOCK_E)
        if SUM_OF_TWO and GROUP_SIZE > 1:
            best += tl.max(tl.where(expert == first[:, None], float("-inf"), inside), axis=1)
        worth = tl.where(group == g, best[:, None], worth)
    allowed = tl.zeros(scores.shape, tl.int32)
    for _ in tl.static_range(TOPK_GROUP):
        _, chosen = _best_first(worth, group, BLOCK_G)
        worth = tl.where(group == chosen[:, None], float("-inf"), worth)
        allowed = tl.where(expert // GROUP_SIZE == chosen[:, None], 1, allowed)
    return tl.where(allowed != 0, scores, float("-inf"))


@triton.jit(do_not_specialize=["num_tokens"])
def topk_routing_kernel(
    logits_ptr,  # [T, E]
    vision_ptr,  # [T] or unused
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
    HAS_BIAS: tl.constexpr,
    STORE_PROBS: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
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
    z = z.to(tl.float32)
    if SIGMOID:
        probs = 1.0 / (1.0 + tl.exp(-z))
    else:
        z = tl.where(expert < E, z, float("-inf"))
        exp = tl.exp(z - tl.max(z, axis=1)[:, None])
        probs = exp / tl.sum(exp, axis=1)[:, None]
    if STORE_PROBS:
        tl.store(probs_ptr + row[:, None] * E + expert, probs, mask=inside)
    scores = probs
    if HAS_BIAS:
        scores += tl.load(bias_ptr + expert, mask=expert < E, other=0.0).to(tl.float32)
    scores = tl.where(expert < E, scores, float("-inf"))
    if N_GROUP > 1:
        scores = _mask_groups(scores, expert, N_GROUP, TOPK_GROUP, E // N_GROUP, HAS_BIAS, BLOCK_G, BLOCK_E)

    slot = tl.arange(0, BLOCK_K)[None, :]  # [1, BK]
    ids = tl.full((BLOCK_T, BLOCK_K), E, tl.int32)
    weights = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for k in tl.static_range(K):
        _, chosen = _best_first(scores, expert, BLOCK_E)  # [BT]
        is_chosen = expert == chosen[:, None]
        weight = tl.sum(tl.where(is_chosen, probs, 0.0), axis=1)
        scores = tl.where(is_chosen, float("-inf"), scores)
        ids = tl.where(slot == k, chosen[:, None], ids)
        weights = tl.where(slot == k, weight[:, None], weights)

    if K_VISION < K:
        is_vision = tl.load(vision_ptr + row, mask=in_rows, other=0) != 0
        inactive = is_vision[:, None] & (slot >= K_VISION)
        reduced = tl.where(inactive, 0.0, weights)
        if RENORMALIZE and not NORMALIZE:
            scale = tl.sum(weights, axis=1) / tl.maximum(tl.sum(reduced, axis=1), 1e-20)
            reduced *= scale[:, None]
        weights = tl.where(is_vision[:, None], reduced, weights)
        ids = tl.where(inactive, E, ids)
    if NORMALIZE:
        weights /= tl.maximum(tl.sum(weights, axis=1), 1e-20)[:, None]
    weights *= scaling

    stored = in_rows[:, None] & (slot < K)
    tl.store(ids_ptr + row[:, None] * K + slot, ids, mask=stored)
    tl.store(weights_ptr + row[:, None] * K + slot, weights, mask=stored)


def routing_blocks(num_experts: int, top_k: int, n_group: int) -> dict[str, int]:
    """Block sizes: about 1,024 scores per program (4,096 spill registers from 72 experts on), at least one token."""
    block_e = triton.next_power_of_2(num_experts)
    return {
        "BLOCK_T": max(1, 1024 // block_e),
        "BLOCK_E": block_e,
        "BLOCK_G": triton.next_power_of_2(n_group),
        "BLOCK_K": triton.next_power_of_2(top_k),
    }


def topk_routing_triton(
    logits: torch.Tensor,  # [T, E]
    vision_mask: torch.Tensor | None,  # [T]
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
    ids = logits.new_empty(num_tokens, top_k, dtype=torch.int32)
    weights = logits.new_empty(num_tokens, top_k, dtype=torch.float32)
    probs = logits.new_empty((num_tokens, num_experts) if return_probs else 0, dtype=torch.float32)
    if num_tokens == 0:
        return ids, weights, probs
    blocks = routing_blocks(num_experts, top_k, n_group)
    topk_routing_kernel[(triton.cdiv(num_tokens, blocks["BLOCK_T"]),)](
        logits,
        vision_mask.contiguous() if vision_mask is not None else logits,
        correction_bias.contiguous() if correction_bias is not None else logits,
        ids,
        weights,
        probs,
        num_tokens,
        logits.stride(0),
        logits.stride(1),
        routed_scaling_factor,
        E=num_experts,
        K=top_k,
        K_VISION=vision_top_k if vision_mask is not None else top_k,
        SIGMOID=scoring == "sigmoid",
        NORMALIZE=norm_topk_prob,
        RENORMALIZE=renormalize,
        HAS_BIAS=correction_bias is not None,
        STORE_PROBS=return_probs,
        N_GROUP=n_group,
        TOPK_GROUP=topk_group,
        **blocks,
    )
    return ids, weights, probs


def aot_variants() -> list[KernelVariant]:
    """Every shipped configuration, for `python -m fastmmoe_kernels.aot`."""
    # experts, top k, sigmoid, normalise, bias, groups, groups chosen: Qwen3-MoE (InternVL3.5, Qwen3-VL), DeepSeek-VL2
    # Small and Base, and the group-limited gate of DeepSeek-V3
    gates = [
        (128, 8, False, True, False, 1, 1),
        (64, 6, False, False, False, 1, 1),
        (72, 6, True, True, True, 1, 1),
        (256, 8, True, True, True, 8, 4),
    ]
    launches = [  # type of the logits, whether vision tokens are reduced, whether probabilities are stored
        ("*fp32", False, False),
        ("*fp32", True, False),
        ("*fp32", True, True),
        ("*bf16", True, False),
        ("*fp16", True, False),
    ]
    return [
        KernelVariant(
            topk_routing_kernel,
            {"logits_ptr": dtype, "vision_ptr": "*u1" if reduced else dtype, "bias_ptr": "*fp32" if bias else dtype,
             "ids_ptr": "*i32", "weights_ptr": "*fp32", "probs_ptr": "*fp32", "num_tokens": "i32",
             "stride_token": "i32", "scaling": "fp32"},
            {"stride_expert": 1, "E": experts, "K": top_k, "K_VISION": top_k // 2 if reduced else top_k,
             "SIGMOID": sigmoid, "NORMALIZE": normalize, "RENORMALIZE": True, "HAS_BIAS": bias,
             "STORE_PROBS": store_probs, "N_GROUP": n_group, "TOPK_GROUP": topk_group,
             **routing_blocks(experts, top_k, n_group)},
            unaligned=("stride_token",) if experts % 16 else (),
        )
        for experts, top_k, sigmoid, normalize, bias, n_group, topk_group in gates
        for dtype, reduced, store_probs in launches
        # groups compile slowly, and differ from the other gates in nothing else
        if n_group == 1 or store_probs
    ]  # fmt: skip
