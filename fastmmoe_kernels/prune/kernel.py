"""A prune stage in Triton: select windows, select tokens and lay out the survivors, move and merge both streams.

Selection is a search for the k-th largest key, bit by bit, on the order-preserving integer image of a float: no sort,
the same result on every run, ties by position.
"""

import torch
import triton
import triton.language as tl

from fastmmoe_kernels.variant import KernelVariant

BLOCK_N = 2048
SELECT_WARPS = 8


@triton.jit
def _ordered_key(x):
    """float32 -> int64 in 1..2^32-1 with the same order; -inf becomes 0, "not selectable"."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    key = tl.where(bits < 0, ~bits.to(tl.int64), bits.to(tl.int64) | 0x80000000) & 0xFFFFFFFF
    return tl.where(x == float("-inf"), 0, key)


@triton.jit
def _load_keys(
    score_ptr, rank_ptr, head_ptr, row, position, n, WINDOW: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Keys of a block of positions: of windows at their first tokens, or (TOKENS) of tokens outside merged windows."""
    inside = position < n
    score = tl.load(score_ptr + row + position, mask=inside, other=float("-inf"))
    if TOKENS:
        rank = tl.load(rank_ptr + row + position, mask=inside, other=-1)
        in_merged = tl.load(head_ptr + row + position - rank % WINDOW, mask=inside & (rank >= 0), other=1)
        score = tl.where(in_merged == 0, score, float("-inf"))
    return _ordered_key(score)


@triton.jit
def _threshold(
    score_ptr, rank_ptr, head_ptr, row, n, count, WINDOW: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """(the count-th largest key, how many keys equal to it are to be taken)."""
    threshold = tl.full((), 0, tl.int64)
    for step in range(32):
        candidate = threshold | (tl.full((), 1, tl.int64) << (31 - step))
        reached = 0
        for start in range(0, n, BLOCK_N):
            keys = _load_keys(score_ptr, rank_ptr, head_ptr, row, start + tl.arange(0, BLOCK_N), n, WINDOW, TOKENS)
            reached += tl.sum((keys >= candidate).to(tl.int32), axis=0)
        threshold = tl.where(reached >= count, candidate, threshold)
    above = 0
    for start in range(0, n, BLOCK_N):
        keys = _load_keys(score_ptr, rank_ptr, head_ptr, row, start + tl.arange(0, BLOCK_N), n, WINDOW, TOKENS)
        above += tl.sum((keys > threshold).to(tl.int32), axis=0)
    return threshold, count - above


@triton.jit
def _take(keys, threshold, ties_to_take, ties_seen):
    """Which keys are selected, and how many ties have been seen up to the end of this block."""
    tie = ((keys == threshold) & (keys > 0)).to(tl.int32)
    earlier = ties_seen + tl.cumsum(tie, axis=0) - tie
    return (keys > threshold) | ((tie != 0) & (earlier < ties_to_take)), ties_seen + tl.sum(tie, axis=0)


@triton.jit(do_not_specialize=["n", "batch"])
def select_windows_kernel(
    redundancy_ptr,  # [B, n], -inf where no window begins
    windows_ptr,  # [B]
    table_ptr,  # [5, B]: start, length, target, most_merged, new start
    head_ptr,  # int8 [B, n] out: 1 at the first token of a merged window
    count_ptr,  # int32 [B] out: merged windows
    n,
    batch,
    BLOCK_N: tl.constexpr,
):
    sample = tl.program_id(0)
    row = sample.to(tl.int64) * n
    most = tl.load(table_ptr + 3 * batch + sample)
    count = tl.maximum(tl.minimum(most, tl.load(windows_ptr + sample) - 1), 0)
    tl.store(count_ptr + sample, count)
    # windows need neither ranks nor merged heads: the first pointer stands in for both
    threshold, ties_to_take = _threshold(
        redundancy_ptr, redundancy_ptr, redundancy_ptr, row, n, count, 1, False, BLOCK_N
    )
    ties_seen = 0
    for start in range(0, n, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        keys = _load_keys(redundancy_ptr, redundancy_ptr, redundancy_ptr, row, position, n, 1, False)
        taken, ties_seen = _take(keys, threshold, ties_to_take, ties_seen)
        tl.store(head_ptr + row + position, taken.to(tl.int8), mask=position < n)


@triton.jit(do_not_specialize=["n", "width", "batch"])
def select_tokens_kernel(
    importance_ptr,  # [B, n]
    rank_ptr,  # [B, n]
    head_ptr,  # int8 [B, n]
    count_ptr,  # [B]
    table_ptr,  # [5, B]: start, length, target, most_merged, new start
    slot_ptr,  # int32 [B, n] out: where the next survivor at or behind a token goes
    index_ptr,  # int64 [B, width] out
    n,
    width,
    batch,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sample = tl.program_id(0)
    row = sample.to(tl.int64) * n
    out_row = sample.to(tl.int64) * width
    first_valid = tl.load(table_ptr + sample)
    length = tl.load(table_ptr + batch + sample)
    count = tl.load(table_ptr + 2 * batch + sample) - tl.load(count_ptr + sample)
    new_start = tl.load(table_ptr + 4 * batch + sample)
    threshold, ties_to_take = _threshold(importance_ptr, rank_ptr, head_ptr, row, n, count, WINDOW, True, BLOCK_N)
    ties_seen = 0
    slot = new_start
    for start in range(0, n, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        keys = _load_keys(importance_ptr, rank_ptr, head_ptr, row, position, n, WINDOW, True)
        kept, ties_seen = _take(keys, threshold, ties_to_take, ties_seen)
        rank = tl.load(rank_ptr + row + position, mask=position < n, other=0)
        head = tl.load(head_ptr + row + position, mask=position < n, other=0)
        text = (rank < 0) & (position >= first_valid) & (position < first_valid + length)
        survives = (kept | (head != 0) | text) & (position < n)
        slots = slot + tl.cumsum(survives.to(tl.int32), axis=0) - survives.to(tl.int32)
        tl.store(slot_ptr + row + position, slots, mask=position < n)
        tl.store(index_ptr + out_row + slots, position.to(tl.int64), mask=survives)
        slot += tl.sum(survives.to(tl.int32), axis=0)
    for start in range(0, width, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        padding = (position < width) & ((position < new_start) | (position >= slot))
        tl.store(index_ptr + out_row + position, tl.full((BLOCK_N,), -1, tl.int64), mask=padding)


@triton.jit
def _move_row(
    x_ptr, out_ptr, token, size, is_merged, H, stride_token, WINDOW: tl.constexpr, MLERP: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Write one output row: a copy, or the merge of `size` consecutive tokens; zeros when size is 0."""
    feature = tl.arange(0, BLOCK_H)
    if is_merged:
        offset = tl.arange(0, BLOCK_W)
        rows = (token + offset).to(tl.int64)[:, None] * stride_token  # [BW, 1]
        member = (offset < size)[:, None]
        scale = 1.0
        if MLERP:
            squares = tl.zeros((BLOCK_W,), tl.float32)
            mean_square = 0.0
            for start in range(0, H, BLOCK_H):
                column = start + feature
                x = tl.load(x_ptr + rows + column[None, :], mask=member & (column < H)[None, :], other=0.0)
                x = x.to(tl.float32)  # [BW, BH]
                mean = tl.sum(x, axis=0) / size
                squares += tl.sum(x * x, axis=1)
                mean_square += tl.sum(mean * mean, axis=0)
            scale = tl.sqrt(tl.max(squares, axis=0)) / tl.maximum(tl.sqrt(mean_square), 1e-10)
        for start in range(0, H, BLOCK_H):
            column = start + feature
            x = tl.load(x_ptr + rows + column[None, :], mask=member & (column < H)[None, :], other=0.0)
            merged = tl.sum(x.to(tl.float32), axis=0) / size * scale
            tl.store(out_ptr + column, merged.to(out_ptr.dtype.element_ty), mask=column < H)
    else:
        for start in range(0, H, BLOCK_H):
            column = start + feature
            x = tl.load(x_ptr + token.to(tl.int64) * stride_token + column, mask=column < H * size, other=0.0)
            tl.store(out_ptr + column, x, mask=column < H)


@triton.jit(do_not_specialize=["n", "width", "hidden_stride_batch", "residual_stride_batch"])
def move_and_merge_kernel(
    hidden_ptr,  # [B, n, H]
    residual_ptr,  # [B, n, H]
    rank_ptr,  # [B, n]
    head_ptr,  # int8 [B, n]
    slot_ptr,  # [B, n]
    index_ptr,  # [B, width]
    out_hidden_ptr,  # [B, width, H] out
    out_residual_ptr,  # [B, width, H] out
    merged_ptr,  # int8 [B, width] out
    out_rank_ptr,  # [B, width] out
    n,
    width,
    H,
    hidden_stride_batch,
    hidden_stride_token,
    residual_stride_batch,
    residual_stride_token,
    WINDOW: tl.constexpr,
    MLERP: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    out = sample * width + tl.program_id(0)
    source = tl.load(index_ptr + out)
    is_token = source >= 0
    token = tl.where(is_token, source, 0)
    row = sample * n
    rank = tl.load(rank_ptr + row + token, mask=is_token, other=-1)
    is_merged = tl.load(head_ptr + row + token, mask=is_token, other=0) != 0
    tl.store(merged_ptr + out, is_merged.to(tl.int8))
    run_start = tl.where(rank >= 0, token - rank, 0)
    new_rank = tl.program_id(0) - tl.load(slot_ptr + row + run_start)
    tl.store(out_rank_ptr + out, tl.where(rank >= 0, new_rank, -1))

    size = is_token.to(tl.int32)
    if is_merged:
        offset = tl.arange(0, BLOCK_W)
        inside = (offset < WINDOW) & (token + offset < n)
        ranks = tl.load(rank_ptr + row + token + offset, mask=inside, other=-1)
        size = tl.sum((inside & (ranks == rank + offset)).to(tl.int32), axis=0)
    _move_row(hidden_ptr + sample * hidden_stride_batch, out_hidden_ptr + out * H, token, size, is_merged, H,
              hidden_stride_token, WINDOW, MLERP, BLOCK_W, BLOCK_H)  # fmt: skip
    _move_row(residual_ptr + sample * residual_stride_batch, out_residual_ptr + out * H, token, size, is_merged, H,
              residual_stride_token, WINDOW, MLERP, BLOCK_W, BLOCK_H)  # fmt: skip


def prune_tokens_triton(
    hidden: torch.Tensor,  # [B, n, H]
    residual: torch.Tensor,  # [B, n, H]
    importance: torch.Tensor,  # [B, n]
    redundancy: torch.Tensor,  # [B, n]
    windows: torch.Tensor,  # [B]
    run_rank: torch.Tensor,  # [B, n]
    table: torch.Tensor,  # [5, B]
    width: int,
    most_merged: int,  # used by the reference, which gathers the merged windows
    window: int,
    merge_method: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, n, features = hidden.shape
    hidden = hidden if hidden.stride(2) == 1 else hidden.contiguous()
    residual = residual if residual.stride(2) == 1 else residual.contiguous()
    out_hidden = hidden.new_empty(batch, width, features)
    out_residual = residual.new_empty(batch, width, features)
    index = run_rank.new_empty(batch, width, dtype=torch.int64)
    merged = run_rank.new_empty(batch, width, dtype=torch.int8)
    out_rank = run_rank.new_empty(batch, width)
    head = run_rank.new_empty(batch, n, dtype=torch.int8)
    count = run_rank.new_empty(batch)
    slot = run_rank.new_empty(batch, n)
    if batch and width:
        select_windows_kernel[(batch,)](
            redundancy, windows, table, head, count, n, batch, BLOCK_N=BLOCK_N, num_warps=SELECT_WARPS
        )
        select_tokens_kernel[(batch,)](
            importance.contiguous(), run_rank, head, count, table, slot, index, n, width, batch,
            WINDOW=window, BLOCK_N=BLOCK_N, num_warps=SELECT_WARPS,
        )  # fmt: skip
        move_and_merge_kernel[(width, batch)](
            hidden, residual, run_rank, head, slot, index, out_hidden, out_residual, merged, out_rank,
            n, width, features, hidden.stride(0), hidden.stride(1), residual.stride(0), residual.stride(1),
            WINDOW=window, MLERP=merge_method == "mlerp", **move_blocks(window, features),
        )  # fmt: skip
    return out_hidden, out_residual, index, merged.view(torch.bool), out_rank


def move_blocks(window: int, features: int) -> dict[str, int]:
    """Block sizes of `move_and_merge_kernel`: a window's slice of at most 4,096 values at a time."""
    block_w = triton.next_power_of_2(window)
    return {"BLOCK_W": block_w, "BLOCK_H": min(triton.next_power_of_2(features), max(16, 4096 // block_w))}


def aot_variants() -> list[KernelVariant]:
    """Every shipped configuration, for `python -m fastmmoe_kernels.aot`."""
    variants = [
        KernelVariant(
            select_windows_kernel,
            {"redundancy_ptr": "*fp32", "windows_ptr": "*i32", "table_ptr": "*i32", "head_ptr": "*i8",
             "count_ptr": "*i32", "n": "i32", "batch": "i32"},
            {"BLOCK_N": BLOCK_N},
            num_warps=SELECT_WARPS,
        ),
        KernelVariant(
            select_tokens_kernel,
            {"importance_ptr": "*fp32", "rank_ptr": "*i32", "head_ptr": "*i8", "count_ptr": "*i32",
             "table_ptr": "*i32", "slot_ptr": "*i32", "index_ptr": "*i64", "n": "i32", "width": "i32", "batch": "i32"},
            {"WINDOW": 3, "BLOCK_N": BLOCK_N},
            num_warps=SELECT_WARPS,
        ),
    ]  # fmt: skip
    variants += [
        KernelVariant(
            move_and_merge_kernel,
            {"hidden_ptr": dtype, "residual_ptr": dtype, "rank_ptr": "*i32", "head_ptr": "*i8", "slot_ptr": "*i32",
             "index_ptr": "*i64", "out_hidden_ptr": dtype, "out_residual_ptr": dtype, "merged_ptr": "*i8",
             "out_rank_ptr": "*i32", "n": "i32", "width": "i32", "H": "i32", "hidden_stride_batch": "i32",
             "hidden_stride_token": "i32", "residual_stride_batch": "i32", "residual_stride_token": "i32"},
            {"WINDOW": 3, "MLERP": mlerp, **move_blocks(3, 2048)},
        )
        for dtype in ("*bf16", "*fp16", "*fp32")
        for mlerp in (True, False)
    ]  # fmt: skip
    return variants
