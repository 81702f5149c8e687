"""The experts as Triton kernels: gather + gate_up GEMM + SwiGLU, down GEMM, weighted sum per token."""

from functools import cache

import torch
import triton
import triton.language as tl

from fastmmoe_kernels.experts.dispatch import dispatch_pairs, dispatch_variants
from fastmmoe_kernels.experts.tiles import BLOCK_M, TILES, ExpertTiles, GemmTile, expert_tiles
from fastmmoe_kernels.grid import cdiv
from fastmmoe_kernels.variant import KernelVariant


@triton.jit
def _tile_and_block(num_tiles, num_blocks, GROUP_M: tl.constexpr):
    """Row tile and column block of this program: GROUP_M neighbouring tiles go through the blocks together."""
    program = tl.program_id(0)
    group = program // (GROUP_M * num_blocks)
    within = program % (GROUP_M * num_blocks)
    size = min(num_tiles - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % size, within // size


@triton.jit(do_not_specialize=["num_tiles", "top_k"])
def gate_up_kernel(
    hidden_ptr,  # [T, H]
    weight_ptr,  # [E, 2I, H]
    order_ptr,  # [P]
    tile_expert_ptr,  # [tiles]
    tile_first_ptr,  # [tiles]
    tile_end_ptr,  # [tiles]
    act_ptr,  # [P, I]
    num_tiles,
    top_k,
    stride_token,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile, block = _tile_and_block(num_tiles, tl.cdiv(I, BLOCK_N), GROUP_M)
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    end = tl.load(tile_end_ptr + tile)
    row = tl.load(tile_first_ptr + tile) + tl.arange(0, BLOCK_M)
    # rows past the end read the last row again: no mask in the loop, and no other expert's token
    token = (tl.load(order_ptr + tl.minimum(row, end - 1)) // top_k).to(tl.int64)
    column = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    # likewise for columns past I
    read = tl.minimum(column, I - 1) if I % BLOCK_N else column
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = hidden_ptr + token[:, None] * stride_token + inner[None, :]
    gate_ptrs = weight_ptr + expert * (2 * I * H) + read[None, :] * H + inner[:, None]
    up_ptrs = gate_ptrs + I * H
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, H, BLOCK_K):
        if H % BLOCK_K:
            x = tl.load(x_ptrs, mask=inner[None, :] < H - k, other=0.0)
            gate_weight = tl.load(gate_ptrs, mask=inner[:, None] < H - k, other=0.0)
            up_weight = tl.load(up_ptrs, mask=inner[:, None] < H - k, other=0.0)
        else:
            x = tl.load(x_ptrs)
            gate_weight = tl.load(gate_ptrs)
            up_weight = tl.load(up_ptrs)
        gate = tl.dot(x, gate_weight, gate, input_precision="ieee")
        up = tl.dot(x, up_weight, up, input_precision="ieee")
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    act = gate / (1.0 + tl.exp(-gate)) * up
    act_ptrs = act_ptr + row.to(tl.int64)[:, None] * I + column[None, :]
    tl.store(act_ptrs, act.to(act_ptr.dtype.element_ty), mask=(row < end)[:, None] & (column < I)[None, :])


@triton.jit(do_not_specialize=["num_tiles"])
def down_kernel(
    act_ptr,  # [P, I]
    weight_ptr,  # [E, H, I]
    tile_expert_ptr,  # [tiles]
    tile_first_ptr,  # [tiles]
    tile_end_ptr,  # [tiles]
    out_ptr,  # [P, H]
    num_tiles,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile, block = _tile_and_block(num_tiles, tl.cdiv(H, BLOCK_N), GROUP_M)
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    end = tl.load(tile_end_ptr + tile)
    row = (tl.load(tile_first_ptr + tile) + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    read = tl.minimum(column, H - 1) if H % BLOCK_N else column
    inner = tl.arange(0, BLOCK_K)
    act_ptrs = act_ptr + tl.minimum(row, end - 1)[:, None] * I + inner[None, :]
    weight_ptrs = weight_ptr + expert * (H * I) + read[None, :] * I + inner[:, None]
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, I, BLOCK_K):
        if I % BLOCK_K:
            act = tl.load(act_ptrs, mask=inner[None, :] < I - k, other=0.0)
            weight = tl.load(weight_ptrs, mask=inner[:, None] < I - k, other=0.0)
        else:
            act = tl.load(act_ptrs)
            weight = tl.load(weight_ptrs)
        out = tl.dot(act, weight, out, input_precision="ieee")
        act_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    out_ptrs = out_ptr + row[:, None] * H + column[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(row < end)[:, None] & (column < H)[None, :])


@triton.jit
def combine_kernel(
    rows_ptr,  # [P, H]
    position_ptr,  # [T, K]
    weights_ptr,  # [T, K]
    out_ptr,  # [T, H]
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for slot in tl.static_range(K):
        row = tl.load(position_ptr + token * K + slot).to(tl.int64)
        # an inactive slot's weight may be anything
        weight = tl.load(weights_ptr + token * K + slot, mask=row >= 0, other=0.0).to(tl.float32)
        values = tl.load(rows_ptr + row * H + column, mask=column < tl.where(row >= 0, H, 0), other=0.0)
        total += weight * values.to(tl.float32)
    tl.store(out_ptr + token * H + column, total.to(out_ptr.dtype.element_ty), mask=column < H)


def moe_experts_triton(
    hidden: torch.Tensor,  # [T, H]
    gate_up_proj: torch.Tensor,  # [E, 2I, H]
    down_proj: torch.Tensor,  # [E, H, I]
    ids: torch.Tensor,  # [T, K]
    weights: torch.Tensor,  # [T, K]
) -> torch.Tensor:
    num_tokens, width = hidden.shape
    num_experts, _, intermediate = down_proj.shape
    num_pairs, top_k = ids.numel(), ids.shape[1]
    if num_pairs == 0:
        return hidden.new_zeros(hidden.shape)
    tiles = expert_tiles(device_target(hidden.device), hidden.dtype, num_pairs / num_experts, width, intermediate)
    order, position, *schedule = dispatch_pairs(ids, num_experts, tiles.block_m)
    num_tiles = schedule[0].numel()

    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    act = hidden.new_empty(num_pairs, intermediate)
    gate_up_kernel[(num_tiles * cdiv(intermediate, tiles.gate_up.block_n),)](
        hidden,
        gate_up_proj.contiguous(),
        order,
        *schedule,
        act,
        num_tiles,
        top_k,
        hidden.stride(0),
        H=width,
        I=intermediate,
        BLOCK_M=tiles.block_m,
        **_launch(tiles.gate_up),
    )
    rows = hidden.new_empty(num_pairs, width)
    down_kernel[(num_tiles * cdiv(width, tiles.down.block_n),)](
        act,
        down_proj.contiguous(),
        *schedule,
        rows,
        num_tiles,
        H=width,
        I=intermediate,
        BLOCK_M=tiles.block_m,
        **_launch(tiles.down),
    )
    out = hidden.new_empty(num_tokens, width)
    block_h = combine_block(width)
    combine_kernel[(num_tokens, cdiv(width, block_h))](
        rows, position, weights.contiguous(), out, H=width, K=top_k, BLOCK_H=block_h
    )
    return out


def _launch(tile: GemmTile) -> dict[str, int]:
    return {
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@cache
def combine_block(width: int) -> int:
    """Columns per program: 8 elements for each of 128 threads."""
    return min(1024, triton.next_power_of_2(width))


@cache
def device_target(device: torch.device) -> str:
    """Such as "sm_90" or "gfx942"; "cpu" under the interpreter."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def aot_variants() -> list[KernelVariant]:
    """Every shipped configuration, for `python -m fastmmoe_kernels.aot`."""
    variants = []
    # experts, slots, H, I: Qwen3-MoE 30B-A3B (InternVL3.5, Qwen3-VL), DeepSeek-VL2
    for num_experts, top_k, width, intermediate in [(128, 8, 2048, 768), (72, 6, 2560, 1536)]:
        variants += dispatch_variants(num_experts)
        for dtype, kind in [(torch.bfloat16, "*bf16"), (torch.float16, "*fp16"), (torch.float32, "*fp32")]:
            variants.append(
                KernelVariant(
                    combine_kernel,
                    {"rows_ptr": kind, "position_ptr": "*i32", "weights_ptr": "*fp32", "out_ptr": kind},
                    {"H": width, "K": top_k, "BLOCK_H": combine_block(width)},
                )
            )
            # the largest launch of each bucket
            for pairs_per_expert in BLOCK_M.values():
                for target in TILES:
                    tiles = expert_tiles(target, dtype, pairs_per_expert, width, intermediate)
                    variants += _gemm_variants(target, kind, width, intermediate, tiles)
    return list({str(variant): variant for variant in variants}.values())


def _gemm_variants(target: str, kind: str, width: int, intermediate: int, tiles: ExpertTiles) -> list[KernelVariant]:
    schedule = dict.fromkeys(("tile_expert_ptr", "tile_first_ptr", "tile_end_ptr"), "*i32")
    shapes = {"H": width, "I": intermediate, "BLOCK_M": tiles.block_m}
    arguments = {
        gate_up_kernel: {"hidden_ptr": kind, "weight_ptr": kind, "order_ptr": "*i32", **schedule, "act_ptr": kind,
                         "num_tiles": "i32", "top_k": "i32", "stride_token": "i32"},
        down_kernel: {"act_ptr": kind, "weight_ptr": kind, **schedule, "out_ptr": kind, "num_tiles": "i32"},
    }  # fmt: skip
    variants = []
    for (kernel, signature), tile in zip(arguments.items(), (tiles.gate_up, tiles.down), strict=True):
        launch = _launch(tile)
        warps_and_stages = {name: launch.pop(name) for name in ("num_warps", "num_stages")}
        # wgmma multiplies 64 rows or more
        is_gemm = tiles.block_m >= 64
        variants.append(
            KernelVariant(kernel, signature, shapes | launch, **warps_and_stages, targets=(target,), is_gemm=is_gemm)
        )
    return variants
