"""A prune stage in Triton: select windows and tokens and lay out the survivors; then move and merge all that they own.

Selection is a search for the k-th largest key, bit by bit, on the order-preserving integer image of a float: no sort,
the same result on every run, ties by position. Each of its 32 steps only counts keys, which lie in the first-level
cache by then; a histogram of 8 bits at a time needs fewer steps, but costs more instructions per key than eight counts.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from fastmmoe_kernels.prune.arguments import PruneArguments, PruneResults
from fastmmoe_kernels.variant import KernelVariant

BLOCK_N = 2048
SELECT_WARPS = 8
UNSELECTABLE = tl.constexpr(-(2**31))


@triton.jit
def _ordered_key(x):
    """float32 -> int32 with the same order; NaN is the largest, as in torch.sort; -inf becomes UNSELECTABLE."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(x != x, 0x7FFFFFFF, key)
    return tl.where(x == float("-inf"), UNSELECTABLE, key)


@triton.jit
def _threshold(key_ptr, n, count, BLOCK_N: tl.constexpr):
    """(a key, how many equal to it to take) such that they and all larger keys are the `count` largest."""
    threshold = tl.full((), UNSELECTABLE, tl.int32)
    step = 0
    above = 0
    reached = -1
    while (step < 32) & (reached != count):
        # set a bit; the first is the sign, and cleared it makes the larger value
        candidate = threshold ^ (tl.full((), 1, tl.int32) << (31 - step))
        counts = tl.zeros((BLOCK_N,), tl.int32)
        for start in range(0, n, BLOCK_N):
            counts += (tl.load(key_ptr + start + tl.arange(0, BLOCK_N)) >= candidate).to(tl.int32)
        reached = tl.sum(counts, axis=0)
        threshold = tl.where(reached >= count, candidate, threshold)
        # keys from the last candidate that went too far on. After 32 steps that is the threshold's successor; after
        # fewer, `count - above` covers all keys that equal the threshold
        above = tl.where(reached < count, reached, above)
        step += 1
    return threshold, count - above


@triton.jit
def _take(keys, threshold, ties_to_take, ties_seen):
    """Which keys are selected, and how many ties have been seen up to the end of this block."""
    tie = ((keys == threshold) & (keys != UNSELECTABLE)).to(tl.int32)
    earlier = ties_seen + tl.cumsum(tie, axis=0) - tie
    return (keys > threshold) | ((tie != 0) & (earlier < ties_to_take)), ties_seen + tl.sum(tie, axis=0)


@triton.jit(do_not_specialize=["n", "width", "batch"])
def select_kernel(
    redundancy_ptr,  # [B, n], -inf where no window begins
    windows_ptr,  # [B]
    importance_ptr,  # [B, n]
    rank_ptr,  # [B, n]
    table_ptr,  # [5, B]: start, length, target, most_merged, new start
    key_ptr,  # int32 [B, n rounded up to blocks] scratch
    head_ptr,  # int8 [B, n] out: 1 at the first token of a merged window
    slot_ptr,  # int32 [B, n] out: where the next survivor at or behind a token goes
    origin_ptr,  # int32 [B, width] out: each survivor's position, -1 at padding
    n,
    width,
    batch,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sample = tl.program_id(0)
    row = sample.to(tl.int64) * n
    key_ptr += sample.to(tl.int64) * (tl.cdiv(n, BLOCK_N) * BLOCK_N)
    origin_ptr += sample.to(tl.int64) * width

    # the table is read where it is needed: held all along, it makes some versions of Triton spill
    most_merged = tl.load(table_ptr + 3 * batch + sample)
    merged = tl.maximum(tl.minimum(most_merged, tl.load(windows_ptr + sample) - 1), 0)
    for start in range(0, n, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        redundancy = tl.load(redundancy_ptr + row + position, mask=position < n, other=float("-inf"))
        tl.store(key_ptr + position, _ordered_key(redundancy))
    tl.debug_barrier()  # one thread's keys are read by others
    threshold, ties_to_take = _threshold(key_ptr, n, merged, BLOCK_N)
    ties_seen = 0
    for start in range(0, n, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        taken, ties_seen = _take(tl.load(key_ptr + position), threshold, ties_to_take, ties_seen)
        tl.store(head_ptr + row + position, taken.to(tl.int8), mask=position < n)
    tl.debug_barrier()  # so are its heads, and the windows' keys may go

    for start in range(0, n, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        rank = tl.load(rank_ptr + row + position, mask=position < n, other=-1)
        importance = tl.load(importance_ptr + row + position, mask=position < n, other=float("-inf"))
        in_merged = tl.load(head_ptr + row + position - rank % WINDOW, mask=rank >= 0, other=1)
        tl.store(key_ptr + position, tl.where(in_merged == 0, _ordered_key(importance), UNSELECTABLE))
    tl.debug_barrier()
    target = tl.load(table_ptr + 2 * batch + sample)
    threshold, ties_to_take = _threshold(key_ptr, n, target - merged, BLOCK_N)
    first_valid = tl.load(table_ptr + sample)
    length = tl.load(table_ptr + batch + sample)
    new_start = tl.load(table_ptr + 4 * batch + sample)
    ties_seen = 0
    slot = new_start
    for start in range(0, n, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        kept, ties_seen = _take(tl.load(key_ptr + position), threshold, ties_to_take, ties_seen)
        rank = tl.load(rank_ptr + row + position, mask=position < n, other=-1)
        head = tl.load(head_ptr + row + position, mask=position < n, other=0)
        text = (rank < 0) & (position >= first_valid) & (position < first_valid + length)
        survives = (kept | (head != 0) | text).to(tl.int32)
        slots = slot + tl.cumsum(survives, axis=0) - survives
        tl.store(slot_ptr + row + position, slots, mask=position < n)
        tl.store(origin_ptr + slots, position, mask=survives != 0)
        slot += tl.sum(survives, axis=0)
    for start in range(0, width, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        padding = (position < width) & ((position < new_start) | (position >= slot))
        tl.store(origin_ptr + position, tl.full((BLOCK_N,), -1, tl.int32), mask=padding)


@triton.jit
def _copy_row(x_ptr, out_ptr, is_token, H, BLOCK_H: tl.constexpr):
    """Write one output row: a copy, or zeros where there is no token."""
    readable = tl.where(is_token, H, 0)
    for start in range(0, H, BLOCK_H):
        column = start + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + column, mask=column < readable, other=0.0)
        tl.store(out_ptr + column, x, mask=column < H)


@triton.jit
def _merge_rows(
    x_ptr, out_ptr, size, H, stride_token, MLERP: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """Write one output row: the merge of `size` consecutive rows."""
    feature = tl.arange(0, BLOCK_H)
    offset = tl.arange(0, BLOCK_W)
    rows = offset.to(tl.int64)[:, None] * stride_token  # [BW, 1]
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
        length = tl.maximum(tl.sqrt(mean_square), 1e-10, propagate_nan=tl.PropagateNan.ALL)
        scale = tl.sqrt(tl.max(squares, axis=0)) / length
    for start in range(0, H, BLOCK_H):
        column = start + feature
        x = tl.load(x_ptr + rows + column[None, :], mask=member & (column < H)[None, :], other=0.0)
        merged = tl.sum(x.to(tl.float32), axis=0) / size * scale
        tl.store(out_ptr + column, merged.to(out_ptr.dtype.element_ty), mask=column < H)


@triton.jit(do_not_specialize=["n", "width"])
def move_and_merge_kernel(
    hidden_ptr,  # [B, n, H]
    residual_ptr,  # [B, n, H]
    source_ptr,  # [B, n], or None
    rank_ptr,  # [B, n]
    head_ptr,  # int8 [B, n]
    slot_ptr,  # [B, n]
    origin_ptr,  # [B, width]
    out_hidden_ptr,  # [B, width, H] out
    out_residual_ptr,  # [B, width, H] out
    index_ptr,  # int64 [B, width] out
    merged_ptr,  # bool [B, width] out
    valid_ptr,  # bool [B, width] out
    out_rank_ptr,  # int32 [B, width] out
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
    row = sample * n
    out = sample * width + tl.program_id(0)
    origin = tl.load(origin_ptr + out)
    is_token = origin >= 0
    token = tl.where(is_token, origin, 0).to(tl.int64)
    rank = tl.load(rank_ptr + row + token, mask=is_token, other=-1)
    is_merged = tl.load(head_ptr + row + token, mask=is_token, other=0) != 0

    index = token
    if source_ptr is not None:
        index = tl.load(source_ptr + row + token)
    tl.store(index_ptr + out, tl.where(is_token, index, -1))
    tl.store(valid_ptr + out, is_token)
    tl.store(merged_ptr + out, is_merged)
    run_start = tl.where(rank >= 0, token - rank, 0)
    new_rank = tl.program_id(0) - tl.load(slot_ptr + row + run_start)
    tl.store(out_rank_ptr + out, tl.where(rank >= 0, new_rank, -1))

    hidden = hidden_ptr + sample * hidden_stride_batch + token * hidden_stride_token
    residual = residual_ptr + sample * residual_stride_batch + token * residual_stride_token
    if is_merged:
        offset = tl.arange(0, BLOCK_W)
        inside = (offset < WINDOW) & (token + offset < n)
        ranks = tl.load(rank_ptr + row + token + offset, mask=inside, other=-1)
        size = tl.sum((inside & (ranks == rank + offset)).to(tl.int32), axis=0)
        _merge_rows(hidden, out_hidden_ptr + out * H, size, H, hidden_stride_token, MLERP, BLOCK_W, BLOCK_H)
        _merge_rows(residual, out_residual_ptr + out * H, size, H, residual_stride_token, MLERP, BLOCK_W, BLOCK_H)
    else:
        _copy_row(hidden, out_hidden_ptr + out * H, is_token, H, BLOCK_H)
        _copy_row(residual, out_residual_ptr + out * H, is_token, H, BLOCK_H)


def prune_batch_triton(stage: PruneArguments) -> PruneResults:
    run_rank, source, width, window = stage.run_rank, stage.source, stage.width, stage.window
    batch, n, features = stage.hidden.shape
    hidden, residual = _unit_last_stride(stage.hidden), _unit_last_stride(stage.residual)
    out_hidden = hidden.new_empty(batch, width, features)
    out_residual = residual.new_empty(batch, width, features)
    index = run_rank.new_empty(batch, width, dtype=torch.int64)
    merged = run_rank.new_empty(batch, width, dtype=torch.bool)
    valid = run_rank.new_empty(batch, width, dtype=torch.bool)
    out_rank = run_rank.new_empty(batch, width)
    if batch and width:
        keys = run_rank.new_empty(batch, -(-n // BLOCK_N) * BLOCK_N)
        head = run_rank.new_empty(batch, n, dtype=torch.int8)
        slot = run_rank.new_empty(batch, n)
        origin = run_rank.new_empty(batch, width)
        select_kernel[(batch,)](
            stage.redundancy, stage.windows, stage.importance.contiguous(), run_rank, stage.table, keys, head, slot,
            origin, n, width, batch, WINDOW=window, BLOCK_N=BLOCK_N, num_warps=SELECT_WARPS,
        )  # fmt: skip
        move_and_merge_kernel[(width, batch)](
            hidden, residual, None if source is None else source.contiguous(), run_rank, head, slot, origin,
            out_hidden, out_residual, index, merged, valid, out_rank,
            n, width, features, *hidden.stride()[:2], *residual.stride()[:2],
            WINDOW=window, MLERP=stage.merge_method == "mlerp", **move_blocks(window, features),
        )  # fmt: skip
    return out_hidden, out_residual, index, merged, valid, out_rank


def _unit_last_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


@cache
def move_blocks(window: int, features: int) -> dict[str, int]:
    """Block sizes of `move_and_merge_kernel`: a window's slice of at most 4,096 values at a time."""
    block_w = triton.next_power_of_2(window)
    return {"BLOCK_W": block_w, "BLOCK_H": min(triton.next_power_of_2(features), max(16, 4096 // block_w))}


def aot_variants() -> list[KernelVariant]:
    """Every shipped configuration, for `python -m fastmmoe_kernels.aot`."""
    variants = [
        KernelVariant(
            select_kernel,
            {"redundancy_ptr": "*fp32", "windows_ptr": "*i32", "importance_ptr": "*fp32", "rank_ptr": "*i32",
             "table_ptr": "*i32", "key_ptr": "*i32", "head_ptr": "*i8", "slot_ptr": "*i32", "origin_ptr": "*i32",
             "n": "i32", "width": "i32", "batch": "i32"},
            {"WINDOW": 3, "BLOCK_N": BLOCK_N},
            num_warps=SELECT_WARPS,
        )
    ]  # fmt: skip
    for has_source in (False, True):  # a prefill's first stage, its later stages
        for dtype in ("*bf16", "*fp16", "*fp32"):
            types = {
                "hidden_ptr": dtype, "residual_ptr": dtype, "rank_ptr": "*i32", "head_ptr": "*i8", "slot_ptr": "*i32",
                "origin_ptr": "*i32", "out_hidden_ptr": dtype, "out_residual_ptr": dtype, "index_ptr": "*i64",
                "merged_ptr": "*u1", "valid_ptr": "*u1", "out_rank_ptr": "*i32", "n": "i32", "width": "i32", "H": "i32",
                "hidden_stride_batch": "i32", "hidden_stride_token": "i32", "residual_stride_batch": "i32",
                "residual_stride_token": "i32",
            }  # fmt: skip
            types |= {"source_ptr": "*i64"} if has_source else {}
            absent = {} if has_source else {"source_ptr": None}
            variants += [
                KernelVariant(
                    move_and_merge_kernel, types, {"WINDOW": 3, "MLERP": mlerp, **absent, **move_blocks(3, 2048)}
                )
                for mlerp in (True, False)
            ]
    return variants
