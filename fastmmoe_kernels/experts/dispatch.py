"""Sort (token, slot) pairs by expert and cut them into row tiles, on the device, in two launches."""

import itertools
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastmmoe_kernels.grid import cdiv
from fastmmoe_kernels.variant import KernelVariant

# chunks of pairs, one program each; every program of the second launch reads every chunk's counts
MAX_CHUNKS = 256
TILES_PER_PROGRAM = 32
NUM_WARPS = 8
TARGETS = {False: ("sm_80", "sm_90", "sm_100"), True: ("gfx942",)}  # by whether they are AMD's


class Dispatch(NamedTuple):
    """P = T * K pairs, expert by expert, the pairs of an expert in token order.

    Attributes:
        order: int32 [P], the pair (token * K + slot) of each sorted row; rows past the last are not written.
        position: int32 [P], the sorted row of each pair; -1 where the slot is inactive, -2 where the row is past the
            most pairs that the host said there are.
        tile_expert: int32 [tiles], the expert of each row tile; -1 past the last tile, which the host does not know.
        tile_first: int32 [tiles], the first row of each tile.
        tile_end: int32 [tiles], the end of the rows of the tile's expert, at most the most pairs.
    """

    order: torch.Tensor
    position: torch.Tensor
    tile_expert: torch.Tensor
    tile_first: torch.Tensor
    tile_end: torch.Tensor


@triton.jit
def _load_one_hot(ids_ptr, pair, num_pairs, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """One row per pair with a 1 at its expert; pairs of no expert have none."""
    ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1)
    expert = tl.arange(0, BLOCK_E)[None, :]
    return ((ids[:, None] == expert) & (expert < NUM_EXPERTS)).to(tl.int32)  # [BP, BE]


@triton.jit(do_not_specialize=["num_pairs", "steps"])
def count_pairs_kernel(
    ids_ptr,  # [P]
    counts_ptr,  # [C, BE]
    num_pairs,
    steps,  # blocks of pairs per chunk
    NUM_EXPERTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    chunk = tl.program_id(0)
    counts = tl.zeros((BLOCK_E,), tl.int32)
    for step in range(steps):
        pair = (chunk * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        counts += tl.sum(_load_one_hot(ids_ptr, pair, num_pairs, NUM_EXPERTS, BLOCK_E), axis=0)
    tl.store(counts_ptr + chunk * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit(do_not_specialize=["num_pairs", "max_pairs", "steps", "num_chunks", "num_tiles", "block_m"])
def place_pairs_kernel(
    ids_ptr,  # [P]
    counts_ptr,  # [C, BE]
    order_ptr,  # [P]
    position_ptr,  # [P]
    tile_expert_ptr,  # [tiles]
    tile_first_ptr,  # [tiles]
    tile_end_ptr,  # [tiles]
    num_pairs,
    max_pairs,
    steps,
    num_chunks,
    num_tiles,
    block_m,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    program = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    earlier = tl.zeros((BLOCK_E,), tl.int32)  # pairs in earlier chunks
    for first in range(0, num_chunks, BLOCK_C):
        chunk = first + tl.arange(0, BLOCK_C)[:, None]
        counts = tl.load(counts_ptr + chunk * BLOCK_E + expert[None, :], mask=chunk < num_chunks, other=0)
        total += tl.sum(counts, axis=0)
        earlier += tl.sum(tl.where(chunk < program, counts, 0), axis=0)
    end = tl.cumsum(total, axis=0)
    row = end - total + earlier  # next sorted row of each expert

    for step in range(steps):
        pair = (program * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        one_hot = _load_one_hot(ids_ptr, pair, num_pairs, NUM_EXPERTS, BLOCK_E)
        rows = row[None, :] + tl.cumsum(one_hot, axis=0) - 1
        is_active = tl.sum(one_hot, axis=1) > 0
        position = tl.where(is_active, tl.sum(one_hot * rows, axis=1), -1)
        tl.store(position_ptr + pair, tl.where(position < max_pairs, position, -2), mask=pair < num_pairs)
        tl.store(order_ptr + position, pair, mask=is_active)
        row += tl.sum(one_hot, axis=0)

    tiles = (total + block_m - 1) // block_m
    tiles_end = tl.cumsum(tiles, axis=0)
    tile = program * BLOCK_T + tl.arange(0, BLOCK_T)
    owner = tl.sum((tiles_end[None, :] <= tile[:, None]).to(tl.int32), axis=1)  # BE past the last tile
    is_owner = owner[:, None] == expert[None, :]  # [BT, BE]
    first_row = end - total + (tile[:, None] - (tiles_end - tiles)[None, :]) * block_m
    tile_first = tl.sum(tl.where(is_owner, first_row, 0), axis=1)
    tile_end = tl.minimum(tl.sum(tl.where(is_owner, end[None, :], 0), axis=1), max_pairs)
    is_tile = (owner < BLOCK_E) & (tile_first < max_pairs)
    tl.store(tile_expert_ptr + tile, tl.where(is_tile, owner, -1), mask=tile < num_tiles)
    tl.store(tile_first_ptr + tile, tile_first, mask=tile < num_tiles)
    tl.store(tile_end_ptr + tile, tile_end, mask=tile < num_tiles)


@cache
def dispatch_blocks(num_experts: int, is_amd: bool) -> dict[str, int]:
    """Block sizes: about 8,192 numbers per two-dimensional block, and no more pairs than registers can hold."""
    block_e = triton.next_power_of_2(num_experts)
    side = max(1, 8192 // block_e)
    # Triton 3.6 spills 32 pairs of 256 experts on gfx942, Triton 3.9 128 pairs of 64 experts on sm_80, 3.7 64 on sm_100
    most = 16 if is_amd and block_e > 128 else 32 if block_e == 64 else 128
    return {"BLOCK_P": min(side, most), "BLOCK_E": block_e, "BLOCK_C": min(side, 64), "BLOCK_T": TILES_PER_PROGRAM}


def dispatch_pairs(ids: torch.Tensor, num_experts: int, block_m: int, max_pairs: int | None = None) -> Dispatch:
    """Sort the slots of `ids` ([T, K], at least one) by expert, with row tiles of `block_m`.

    With `max_pairs`, the most slots that are active, as far as the host knows, there are tiles for so many.
    """
    num_pairs = ids.numel()
    max_pairs = num_pairs if max_pairs is None else min(max_pairs, num_pairs)
    # every expert's last tile may hold a single row
    num_tiles = (max_pairs + min(num_experts, max_pairs) * (block_m - 1)) // block_m
    order, position = (ids.new_empty(num_pairs, dtype=torch.int32) for _ in range(2))
    tile_expert, tile_first, tile_end = (ids.new_empty(num_tiles, dtype=torch.int32) for _ in range(3))
    blocks = dispatch_blocks(num_experts, torch.version.hip is not None)
    counting = {name: blocks[name] for name in ("BLOCK_P", "BLOCK_E")}
    steps = cdiv(num_pairs, MAX_CHUNKS * blocks["BLOCK_P"])
    num_chunks = cdiv(num_pairs, steps * blocks["BLOCK_P"])
    counts = ids.new_empty(num_chunks, blocks["BLOCK_E"], dtype=torch.int32)
    ids = ids.contiguous()
    count_pairs_kernel[(num_chunks,)](
        ids, counts, num_pairs, steps, NUM_EXPERTS=num_experts, **counting, num_warps=NUM_WARPS
    )
    place_pairs_kernel[(max(num_chunks, cdiv(num_tiles, TILES_PER_PROGRAM)),)](
        ids,
        counts,
        order,
        position,
        tile_expert,
        tile_first,
        tile_end,
        num_pairs,
        max_pairs,
        steps,
        num_chunks,
        num_tiles,
        block_m,
        NUM_EXPERTS=num_experts,
        **blocks,
        num_warps=NUM_WARPS,
    )
    return Dispatch(order, position, tile_expert, tile_first, tile_end)


def dispatch_variants(num_experts: int) -> list[KernelVariant]:
    """The configurations for `num_experts`, for `aot_variants`."""
    outputs = ("order_ptr", "position_ptr", "tile_expert_ptr", "tile_first_ptr", "tile_end_ptr")
    sizes = ("max_pairs", "num_chunks", "num_tiles", "block_m")
    variants = []
    for ids, (is_amd, targets) in itertools.product(("*i32", "*i64"), TARGETS.items()):
        blocks = dispatch_blocks(num_experts, is_amd)
        counting = {name: blocks[name] for name in ("BLOCK_P", "BLOCK_E")}
        count = {"ids_ptr": ids, "counts_ptr": "*i32", "num_pairs": "i32", "steps": "i32"}
        place = count | dict.fromkeys(outputs, "*i32") | dict.fromkeys(sizes, "i32")
        common = {"num_warps": NUM_WARPS, "targets": targets}
        variants += [
            KernelVariant(count_pairs_kernel, count, {"NUM_EXPERTS": num_experts, **counting}, **common),
            KernelVariant(place_pairs_kernel, place, {"NUM_EXPERTS": num_experts, **blocks}, **common),
        ]
    return variants
