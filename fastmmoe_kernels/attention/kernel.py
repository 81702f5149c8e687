"""Attention of the last token in two Triton launches, split over the keys; no atomics, so bitwise repeatable.

Launch 1 reads each key once, for all query heads of its group, and leaves the logits and every block's maximum and
sum of exponentials. Launch 2 combines the blocks' statistics and the sinks, and averages the probabilities over heads.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from fastmmoe_kernels.grid import cdiv
from fastmmoe_kernels.variant import KernelVariant


# nothing that changes with the number of keys may be specialised: a new length must not compile anew
@triton.jit(
    do_not_specialize=["num_keys", "heads_per_mask", "stride_qb", "stride_qh", "stride_kb", "stride_kh"],
    do_not_specialize_on_alignment=["query_ptr", "key_ptr", "mask_ptr"],
)
def attention_logits_kernel(
    query_ptr,  # [B, Hq, D]
    key_ptr,  # [B, Hkv, n, D]
    mask_ptr,  # [B, Hq / heads_per_mask, n], or None
    logits_ptr,  # [B, Hq, blocks * BN]
    max_ptr,  # [B, Hq, blocks]
    sum_ptr,  # [B, Hq, blocks]
    num_keys,
    heads_per_mask,
    stride_qb,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    scale,
    D: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0)
    group = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    num_blocks = tl.num_programs(0)
    num_groups = tl.num_programs(1)
    position = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    member = tl.arange(0, BLOCK_G)  # [BG]
    head = group * HEADS_PER_GROUP + member
    valid = (position < num_keys)[None, :]  # [1, BN]
    if mask_ptr is not None:
        # BM is 1 where all heads of the group see the same row, else BG
        viewer = tl.arange(0, BLOCK_M)  # [BM]
        mask_row = (group * HEADS_PER_GROUP + viewer) // heads_per_mask
        mask_row += batch * (num_groups * HEADS_PER_GROUP // heads_per_mask)
        valid = valid & (viewer < HEADS_PER_GROUP)[:, None]  # [BM, BN]
        valid &= tl.load(mask_ptr + mask_row[:, None] * num_keys + position[None, :], mask=valid, other=0) != 0
    read = tl.max(valid.to(tl.int32), axis=0) != 0  # [BN]

    query_ptr += batch * stride_qb
    key_ptr += batch * stride_kb + group.to(tl.int64) * stride_kh
    if ALIGNED:
        # the strides are not specialised: without this hint no load would be wider than one element
        query_ptr = tl.multiple_of(query_ptr, 16)
        stride_qh = tl.multiple_of(stride_qh, 16)
        key_ptr = tl.multiple_of(key_ptr, 16)
    query_ptrs = query_ptr + head[:, None].to(tl.int64) * stride_qh  # [BG, 1]
    key_ptrs = key_ptr + position[None, :] * stride_kn  # [1, BN]
    logits = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D).to(tl.int64)  # [BD]
        query = tl.load(
            query_ptrs + d[None, :] * stride_qd, mask=(member[:, None] < HEADS_PER_GROUP) & (d[None, :] < D), other=0.0
        )
        # keys masked for all heads of the group cost no bandwidth
        key = tl.load(key_ptrs + d[:, None] * stride_kd, mask=read[None, :] & (d[:, None] < D), other=0.0)
        logits = tl.dot(query, key, logits, input_precision="ieee")
    logits = tl.where(valid, logits * scale, float("-inf"))

    block_max = tl.max(logits, axis=1)  # [BG]
    # exp(-inf - 0) = 0 where no key of the block is valid
    block_sum = tl.sum(tl.exp(logits - tl.where(block_max == float("-inf"), 0.0, block_max)[:, None]), axis=1)
    row = (batch * num_groups * HEADS_PER_GROUP + head) * num_blocks + block  # [BG]
    stored = member < HEADS_PER_GROUP
    tl.store(max_ptr + row, block_max, mask=stored)
    tl.store(sum_ptr + row, block_sum, mask=stored)
    tl.store(logits_ptr + row[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], logits, mask=stored[:, None])


@triton.jit(do_not_specialize=["num_keys"])
def attention_mean_kernel(
    logits_ptr,  # [B, Hq, blocks * BN]
    max_ptr,  # [B, Hq, blocks]
    sum_ptr,  # [B, Hq, blocks]
    sinks_ptr,  # [Hq], or None
    output_ptr,  # [B, n]
    num_keys,
    NUM_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    block = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    num_blocks = tl.num_programs(0)
    column = tl.arange(0, BLOCK_N)[None, :]  # [1, BN]
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, NUM_HEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)  # [BH]
        row = ((batch * NUM_HEADS + head) * num_blocks)[:, None]  # [BH, 1]
        inside = (head < NUM_HEADS)[:, None]
        sink = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head, mask=head < NUM_HEADS, other=float("-inf")).to(tl.float32)
        highest = sink
        for start in range(0, num_blocks, BLOCK_S):
            other = start + tl.arange(0, BLOCK_S)[None, :]  # [1, BS]
            block_max = tl.load(max_ptr + row + other, mask=inside & (other < num_blocks), other=float("-inf"))
            highest = tl.maximum(highest, tl.max(block_max, axis=1))
        # without a valid key every exp(-inf - 0) below is 0
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        denominator = tl.exp(sink - highest)
        highest = highest[:, None]  # [BH, 1]
        for start in range(0, num_blocks, BLOCK_S):
            other = start + tl.arange(0, BLOCK_S)[None, :]
            listed = inside & (other < num_blocks)
            block_max = tl.load(max_ptr + row + other, mask=listed, other=float("-inf"))
            block_sum = tl.load(sum_ptr + row + other, mask=listed, other=0.0)
            denominator += tl.sum(block_sum * tl.exp(block_max - highest), axis=1)
        denominator = tl.where(denominator == 0.0, 1.0, denominator)[:, None]
        logits = tl.load(logits_ptr + (row + block) * BLOCK_N + column, mask=inside, other=float("-inf"))
        # a masked key gets 0 from a head whose denominator is NaN, too
        total += tl.sum(tl.where(logits == float("-inf"), 0.0, tl.exp(logits - highest) / denominator), axis=0)
    position = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(output_ptr + batch * num_keys + position, total / NUM_HEADS, mask=position < num_keys)


@cache
def attention_blocks(heads_per_group: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """Block sizes of launch 1: rows of 128 bytes, at most 4,096 logits per program, 16 at least as `tl.dot` wants."""
    block_g = max(16, triton.next_power_of_2(heads_per_group))
    return {
        "BLOCK_N": max(16, min(128, 4096 // block_g)),
        "BLOCK_G": block_g,
        "BLOCK_D": max(16, min(128 // itemsize, triton.next_power_of_2(head_dim))),
    }


def logits_stages(itemsize: int) -> int:
    """Pipeline stages of launch 1. float32 spills a few bytes on sm_100 with Triton's usual three."""
    return 4 if itemsize == 4 else 3


@cache
def mean_blocks(num_heads: int) -> dict[str, int]:
    """Block sizes of launch 2, beside launch 1's BLOCK_N."""
    return {"BLOCK_H": min(16, triton.next_power_of_2(num_heads)), "BLOCK_S": 64}


def last_query_attention_triton(
    query: torch.Tensor,  # [B, Hq, D]
    key: torch.Tensor,  # [B, Hkv, n, D]
    key_mask: torch.Tensor | None,  # [B, n] or [B, Hm, n]
    sinks: torch.Tensor | None,  # [Hq]
    scale: float,
) -> torch.Tensor:
    batch_size, num_heads, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    output = query.new_empty(batch_size, num_keys, dtype=torch.float32)
    if output.numel() == 0:
        return output
    heads_per_group = num_heads // num_kv_heads
    heads_per_mask = num_heads // key_mask.shape[1] if key_mask is not None and key_mask.dim() == 3 else num_heads
    blocks = attention_blocks(heads_per_group, head_dim, key.element_size())
    num_blocks = cdiv(num_keys, blocks["BLOCK_N"])
    # whole blocks: every row of logits starts aligned, whatever the number of keys
    logits = query.new_empty(batch_size, num_heads, num_blocks * blocks["BLOCK_N"], dtype=torch.float32)
    block_max = query.new_empty(batch_size, num_heads, num_blocks, dtype=torch.float32)
    block_sum = torch.empty_like(block_max)
    outer = (query.data_ptr(), key.data_ptr(), *query.stride()[:2], *key.stride()[:2])
    attention_logits_kernel[(num_blocks, num_kv_heads, batch_size)](
        query,
        key,
        None if key_mask is None else key_mask.contiguous(),
        logits,
        block_max,
        block_sum,
        num_keys,
        heads_per_mask,
        *query.stride(),
        *key.stride(),
        scale,
        D=head_dim,
        HEADS_PER_GROUP=heads_per_group,
        ALIGNED=all(x % 16 == 0 for x in outer),
        BLOCK_M=1 if heads_per_mask % heads_per_group == 0 else blocks["BLOCK_G"],
        **blocks,
        num_stages=logits_stages(key.element_size()),
    )
    attention_mean_kernel[(num_blocks, batch_size)](
        logits,
        block_max,
        block_sum,
        None if sinks is None else sinks.contiguous(),
        output,
        num_keys,
        NUM_HEADS=num_heads,
        BLOCK_N=blocks["BLOCK_N"],
        **mean_blocks(num_heads),
    )
    return output


def aot_variants() -> list[KernelVariant]:
    """Every shipped configuration, for `python -m fastmmoe_kernels.aot`."""
    # query heads, key heads, head dimension: InternVL3.5-30B-A3B, Qwen3-VL-235B-A22B and MiniMax-M3, gpt-oss,
    # DeepSeek-VL2 Tiny, Small, Base
    models = [(32, 4, 128), (64, 4, 128), (64, 8, 64), (10, 10, 128), (16, 16, 192), (32, 32, 192)]
    group_shapes = sorted({(heads // kv_heads, head_dim) for heads, kv_heads, head_dim in models})
    launches = [  # query heads per key head, head dimension, type, whose rows the mask has, whether rows are aligned
        *((*shape, "bf16", mask, True) for shape in group_shapes for mask in (None, "group")),
        *((*shape, dtype, "group", True) for shape in ((8, 128), (1, 192)) for dtype in ("fp16", "fp32")),
        (8, 128, "bf16", "group", False),
        (16, 128, "bf16", "head", True),
    ]
    variants = [
        KernelVariant(
            attention_logits_kernel,
            {"query_ptr": f"*{dtype}", "key_ptr": f"*{dtype}", "logits_ptr": "*fp32", "max_ptr": "*fp32",
             "sum_ptr": "*fp32", "num_keys": "i32", "heads_per_mask": "i32", "stride_qb": "i32", "stride_qh": "i32",
             "stride_kb": "i32", "stride_kh": "i32", "stride_kn": "i32", "scale": "fp32",
             **({"mask_ptr": "*u1"} if mask else {})},
            {"stride_qd": 1, "stride_kd": 1, "D": head_dim, "HEADS_PER_GROUP": heads, "ALIGNED": aligned,
             "BLOCK_M": blocks["BLOCK_G"] if mask == "head" else 1, **blocks, **({} if mask else {"mask_ptr": None})},
            num_stages=logits_stages(itemsize),
        )
        for heads, head_dim, dtype, mask, aligned in launches
        for itemsize in (4 if dtype == "fp32" else 2,)
        for blocks in (attention_blocks(heads, head_dim, itemsize),)
    ]  # fmt: skip
    block_sizes = sorted({(h, attention_blocks(h // kv, d, 2)["BLOCK_N"]) for h, kv, d in models})
    variants += [
        KernelVariant(
            attention_mean_kernel,
            {"logits_ptr": "*fp32", "max_ptr": "*fp32", "sum_ptr": "*fp32", "output_ptr": "*fp32", "num_keys": "i32",
             **({"sinks_ptr": sinks} if sinks else {})},
            {"NUM_HEADS": heads, "BLOCK_N": block_n, **mean_blocks(heads), **({} if sinks else {"sinks_ptr": None})},
        )
        for heads, block_n, sinks in [*((*sizes, None) for sizes in block_sizes), (64, 128, "*bf16")]
    ]  # fmt: skip
    return variants
