"""Tile sizes of the expert GEMMs, by target and by pairs per expert.

No entry has been tuned on a device: they follow what other projects ship for the same shapes, and compile without
spilling registers. A new GPU costs a row in `TILES`, one in `SHARED_MEMORY`, and one in `MOST_PAIRS` if it differs.
"""

import math
from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class GemmTile:
    """One program's share of a GEMM.

    Attributes:
        block_n: columns; of each of the two halves in the gate_up GEMM.
        block_k: elements of the inner dimension per step.
        num_warps, num_stages: as in Triton.
        group_m: neighbouring row tiles that go through the column blocks together, so that they share weights in L2.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8


@dataclass(frozen=True)
class ExpertTiles:
    """Rows per tile, which both GEMMs share because they share the row tiles, and the rest of each."""

    block_m: int
    gate_up: GemmTile
    down: GemmTile


# bytes that one program may have
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_87": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_103": 227 * 1024,
    "sm_120": 99 * 1024,
    "sm_121": 99 * 1024,
    "gfx942": 64 * 1024,
}
DEFAULT_SHARED_MEMORY = 64 * 1024

# target -> rows per tile -> most active pairs per expert that they are used for
DEFAULT_MOST_PAIRS = {16: 16, 32: 48, 64: 192, 128: math.inf}
MOST_PAIRS = {
    # estimated: a tile of 128 rows reads weights from L2 half as often, and that is what bounds the GEMMs here
    "sm_90": {16: 12, 32: 24, 64: 56, 128: math.inf},
}

# target -> rows per tile -> tiles of gate_up and down, for 16-bit types
TILES = {
    "sm_80": {
        16: (GemmTile(64, 128, 4, 3), GemmTile(64, 128, 4, 4)),
        32: (GemmTile(64, 64, 4, 4), GemmTile(128, 64, 4, 4)),
        64: (GemmTile(64, 64, 4, 3), GemmTile(128, 64, 4, 3)),
        128: (GemmTile(64, 64, 8, 3), GemmTile(128, 64, 8, 3)),
    },
    "sm_90": {
        16: (GemmTile(64, 128, 4, 4), GemmTile(64, 128, 4, 4)),
        32: (GemmTile(64, 128, 4, 4), GemmTile(128, 64, 4, 4)),
        # 72 KB: three programs share a multiprocessor
        64: (GemmTile(64, 64, 4, 3), GemmTile(128, 64, 4, 3)),
        128: (GemmTile(128, 64, 8, 4), GemmTile(256, 64, 8, 4)),
    },
    "sm_100": {
        16: (GemmTile(64, 128, 4, 4), GemmTile(64, 128, 4, 4)),
        32: (GemmTile(64, 128, 4, 4), GemmTile(128, 64, 4, 4)),
        64: (GemmTile(128, 64, 4, 4), GemmTile(256, 64, 4, 4)),
        128: (GemmTile(128, 64, 8, 4), GemmTile(256, 64, 8, 4)),
    },
    "gfx942": {
        16: (GemmTile(64, 64, 4, 2), GemmTile(64, 128, 4, 2)),
        32: (GemmTile(64, 64, 4, 2), GemmTile(128, 64, 4, 2)),
        64: (GemmTile(64, 64, 4, 2), GemmTile(128, 64, 4, 2)),
        128: (GemmTile(64, 64, 8, 2), GemmTile(128, 64, 8, 2)),
    },
}
DEFAULT_TARGET = "sm_80"

# float32 has no tensor cores at full precision: small tiles, for registers' sake, on every target
TILES_FLOAT32 = {
    16: (GemmTile(32, 32, 4, 2), GemmTile(64, 32, 4, 2)),
    32: (GemmTile(32, 32, 4, 2), GemmTile(64, 32, 4, 2)),
    64: (GemmTile(32, 32, 8, 2), GemmTile(64, 32, 8, 2)),
}


def expert_tiles(
    target: str, dtype: torch.dtype, pairs_per_expert: float, hidden: int, intermediate: int, has_gate: bool = True
) -> ExpertTiles:
    """The tiles for a launch. Pure, and with few different results, so that few kernels are compiled.

    Args:
        target: compute capability as "sm_90", or AMD architecture as "gfx942"; unknown ones get the default row.
        dtype: of the tokens and weights.
        pairs_per_expert: mean over all experts of the active pairs, as far as the host knows; else T * K / E.
        hidden, intermediate: H and I.
        has_gate: whether the first GEMM multiplies with a gate as well; without one it is like the second.
    """
    by_rows, most = _rows(target, dtype), most_pairs(target)
    fitting = [rows for rows in by_rows if pairs_per_expert <= most[rows]]
    block_m = min(fitting, default=max(by_rows))
    return tiles_of_rows(target, dtype, block_m, hidden, intermediate, has_gate)


def most_pairs(target: str) -> dict[int, float]:
    """Rows per tile -> most active pairs per expert."""
    return MOST_PAIRS.get(target, DEFAULT_MOST_PAIRS)


def _rows(target: str, dtype: torch.dtype) -> dict[int, tuple[GemmTile, GemmTile]]:
    return TILES_FLOAT32 if dtype == torch.float32 else TILES.get(target, TILES[DEFAULT_TARGET])


@cache
def tiles_of_rows(
    target: str, dtype: torch.dtype, block_m: int, hidden: int, intermediate: int, has_gate: bool = True
) -> ExpertTiles:
    """The table's tiles of so many rows, as large as matrices and memory allow."""
    gate_up, down = _rows(target, dtype)[block_m]
    gate_up, operands = (gate_up, 2) if has_gate else (down, 1)
    return ExpertTiles(
        block_m,
        _clamp(gate_up, target, block_m, operands, dtype.itemsize, inner=hidden, columns=intermediate),
        _clamp(down, target, block_m, 1, dtype.itemsize, inner=intermediate, columns=hidden),
    )


def shared_memory(tile: GemmTile, target: str, block_m: int, operands: int, itemsize: int) -> int:
    """Bytes that a program needs at most, with `operands` weight tiles (2 in the gate_up GEMM)."""
    # on AMD the newest stage is in registers
    buffers = tile.num_stages - 1 if target.startswith("gfx") else tile.num_stages
    # a kilobyte for barriers
    return buffers * (block_m + operands * tile.block_n) * tile.block_k * itemsize + 1024


def _clamp(
    tile: GemmTile, target: str, block_m: int, operands: int, itemsize: int, *, inner: int, columns: int
) -> GemmTile:
    """No larger than the matrix, and within the target's memory: fewer stages (at least 2), then smaller tiles."""
    limit = SHARED_MEMORY.get(target, DEFAULT_SHARED_MEMORY)
    tile = replace(tile, block_n=min(tile.block_n, _power_of_2(columns)), block_k=min(tile.block_k, _power_of_2(inner)))
    while shared_memory(tile, target, block_m, operands, itemsize) > limit:
        if tile.num_stages > 2:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif tile.block_n > 32:
            tile = replace(tile, block_n=tile.block_n // 2)
        else:
            tile = replace(tile, block_k=tile.block_k // 2)
    return tile


def _power_of_2(size: int) -> int:
    """The next power of 2, at least 16: what `tl.dot` takes."""
    return max(16, 1 << (size - 1).bit_length())
