"""Window redundancy in Triton: one program per token scores the window it heads, one per sample normalises."""

from functools import cache

import torch
import triton
import triton.language as tl

from fastmmoe_kernels.variant import KernelVariant

BLOCK_N = 2048
NORMALIZE_WARPS = 8


@triton.jit(do_not_specialize=["n", "stride_batch"])
def window_similarity_kernel(
    probs_ptr,  # [B, n, E]
    importance_ptr,  # [B, n]
    rank_ptr,  # [B, n]
    similarity_ptr,  # [B, n] out
    attention_ptr,  # [B, n] out, mean over the window
    n,
    stride_batch,
    stride_token,
    E: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    position = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * n
    rank = tl.load(rank_ptr + row + position)
    similarity = 0.0
    attention = 0.0
    if (rank >= 0) & (rank % WINDOW == 0):
        offset = tl.arange(0, BLOCK_W)  # [BW]
        expert = tl.arange(0, BLOCK_E)  # [BE]
        inside = (offset < WINDOW) & (position + offset < n)
        # the next tokens belong to the window as long as they continue the run
        member = inside & (tl.load(rank_ptr + row + position + offset, mask=inside, other=-1) == rank + offset)
        size = tl.sum(member.to(tl.float32), axis=0)
        token = tl.program_id(1).to(tl.int64) * stride_batch + (position + offset).to(tl.int64) * stride_token
        p = tl.load(
            probs_ptr + token[:, None] + expert[None, :], mask=member[:, None] & (expert < E)[None, :], other=0.0
        )  # [BW, BE]
        mean = tl.sum(p, axis=0) / size  # [BE]
        dot = tl.sum(p * mean[None, :], axis=1)  # [BW]
        norms = tl.sqrt(tl.sum(p * p, axis=1)) * tl.sqrt(tl.sum(mean * mean, axis=0))
        cosine = tl.where(member, dot / tl.maximum(norms, 1e-20), 0.0)
        similarity = tl.where(size > 1, tl.sum(cosine, axis=0) / size, 0.0)
        a = tl.load(importance_ptr + row + position + offset, mask=member, other=0.0)
        attention = tl.sum(a, axis=0) / size
    tl.store(similarity_ptr + row + position, similarity)
    tl.store(attention_ptr + row + position, attention)


@triton.jit(do_not_specialize=["n"])
def window_redundancy_kernel(
    rank_ptr,  # [B, n]
    similarity_ptr,  # [B, n]
    attention_ptr,  # [B, n] in: window means; out: divided by the sample's maximum
    redundancy_ptr,  # [B, n] out
    windows_ptr,  # [B] out
    n,
    alpha,
    WINDOW: tl.constexpr,
    STRATEGY: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * n
    most = float("-inf")
    windows = 0
    for start in range(0, n, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        rank = tl.load(rank_ptr + row + position, mask=position < n, other=-1)
        is_head = (rank >= 0) & (rank % WINDOW == 0)
        a = tl.load(attention_ptr + row + position, mask=position < n, other=0.0)
        # of the windows that have a number: NaN is a matter of its own window
        most = tl.maximum(most, tl.max(tl.where(is_head & (a == a), a, float("-inf")), axis=0))
        windows += tl.sum(is_head.to(tl.int32), axis=0)
    tl.store(windows_ptr + tl.program_id(0), windows)
    for start in range(0, n, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        rank = tl.load(rank_ptr + row + position, mask=position < n, other=-1)
        is_head = (rank >= 0) & (rank % WINDOW == 0)
        a = tl.load(attention_ptr + row + position, mask=position < n, other=0.0) / (most + 1e-10)
        s = tl.load(similarity_ptr + row + position, mask=position < n, other=0.0)
        if STRATEGY == "hybrid":
            c = alpha * s - (1.0 - alpha) * a
        elif STRATEGY == "routing_similarity":
            c = s
        else:
            c = -a
        tl.store(attention_ptr + row + position, tl.where(is_head, a, 0.0), mask=position < n)
        tl.store(redundancy_ptr + row + position, tl.where(is_head, c, float("-inf")), mask=position < n)


def window_scores_triton(
    probs: torch.Tensor,  # [B, n, E]
    importance: torch.Tensor,  # [B, n]
    run_rank: torch.Tensor,  # [B, n]
    window: int,
    alpha: float,
    strategy: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, n, num_experts = probs.shape
    probs = probs.contiguous()
    similarity = probs.new_empty(batch, n)
    attention = torch.empty_like(similarity)
    redundancy = torch.empty_like(similarity)
    windows = run_rank.new_empty(batch)
    if n:
        window_similarity_kernel[(n, batch)](
            probs,
            importance.contiguous(),
            run_rank,
            similarity,
            attention,
            n,
            probs.stride(0),
            probs.stride(1),
            E=num_experts,
            WINDOW=window,
            **similarity_blocks(window, num_experts),
        )
    if batch:
        window_redundancy_kernel[(batch,)](
            run_rank, similarity, attention, redundancy, windows, n, alpha,
            WINDOW=window, STRATEGY=strategy, BLOCK_N=BLOCK_N, num_warps=NORMALIZE_WARPS,
        )  # fmt: skip
    return similarity, attention, redundancy, windows


@cache
def similarity_blocks(window: int, num_experts: int) -> dict[str, int]:
    return {"BLOCK_W": triton.next_power_of_2(window), "BLOCK_E": triton.next_power_of_2(num_experts)}


def aot_variants() -> list[KernelVariant]:
    """Every shipped configuration, for `python -m fastmmoe_kernels.aot`."""
    variants = [
        KernelVariant(
            window_similarity_kernel,
            {"probs_ptr": "*fp32", "importance_ptr": "*fp32", "rank_ptr": "*i32", "similarity_ptr": "*fp32",
             "attention_ptr": "*fp32", "n": "i32", "stride_batch": "i32", "stride_token": "i32"},
            {"E": experts, "WINDOW": 3, **similarity_blocks(3, experts)},
            unaligned=("stride_token",) if experts % 16 else (),
        )
        for experts in (64, 72, 128)
    ]  # fmt: skip
    variants += [
        KernelVariant(
            window_redundancy_kernel,
            {"rank_ptr": "*i32", "similarity_ptr": "*fp32", "attention_ptr": "*fp32", "redundancy_ptr": "*fp32",
             "windows_ptr": "*i32", "n": "i32", "alpha": "fp32"},
            {"WINDOW": 3, "STRATEGY": strategy, "BLOCK_N": BLOCK_N},
            num_warps=NORMALIZE_WARPS,
        )
        for strategy in ("hybrid", "routing_similarity", "dynamic_attention")
    ]  # fmt: skip
    return variants
