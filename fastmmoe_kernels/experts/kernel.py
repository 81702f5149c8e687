"""The experts as Triton kernels: gather + gate_up GEMM + activation, down GEMM, weighted sum per token."""

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from fastmmoe_kernels.experts.dispatch import dispatch_pairs, dispatch_variants
from fastmmoe_kernels.experts.options import SWIGLU, ExpertOptions
from fastmmoe_kernels.experts.tiles import TILES, ExpertTiles, GemmTile, expert_tiles, most_pairs
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


@triton.jit
def _weight_ptrs(
    weight_ptr, expert, column, inner, STRIDE_E: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr
):
    """[BK, BN]; expert and column are int64."""
    if STRIDE_K != 1:
        inner = inner.to(tl.int64)
    return weight_ptr + expert * STRIDE_E + column[None, :] * STRIDE_N + inner[:, None] * STRIDE_K


@triton.jit
def _load_weight(ptrs, column, inner, left, N: tl.constexpr, MASK_N: tl.constexpr, MASK_K: tl.constexpr):
    """[BK, BN], zeros past the `left` inner elements and, with MASK_N, past N columns."""
    if MASK_N and MASK_K:
        weight = tl.load(ptrs, mask=(inner[:, None] < left) & (column[None, :] < N), other=0.0)
    elif MASK_N:
        weight = tl.load(ptrs, mask=column[None, :] < N, other=0.0)
    elif MASK_K:
        weight = tl.load(ptrs, mask=inner[:, None] < left, other=0.0)
    else:
        weight = tl.load(ptrs)
    return weight


@triton.jit
def _start(bias_ptrs, column, N: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BM, BN], what the products are added to: after the loop a bias would need registers when they are scarce."""
    start = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_BIAS:
        start += tl.load(bias_ptrs, mask=column < N, other=0.0).to(tl.float32)[None, :]
    return start


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """[BM, BN], in float32; without a gate, `gate` is all there is. NaN stays NaN."""
    if ACTIVATION == "relu2":
        act = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
        act = act * act
    else:
        if LIMIT is not None:
            up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
            if ACTIVATION != "silu_clamped":
                gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        if ACTIVATION == "oai":
            act = gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + 1.0)
        elif ACTIVATION == "gelu_tanh":
            # (1 + tanh(y)) / 2 = sigmoid(2 y)
            double = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
            act = gate / (1.0 + tl.exp(-double)) * up
        elif ACTIVATION == "silu_clamped":
            silu = gate / (1.0 + tl.exp(-gate))
            act = tl.minimum(silu, LIMIT, propagate_nan=tl.PropagateNan.ALL) * up
        else:
            act = gate / (1.0 + tl.exp(-gate)) * up
    return act


@triton.jit(do_not_specialize=["num_tiles", "top_k"])
def gate_up_kernel(
    hidden_ptr,  # [T, H]
    weight_ptr,  # [E, N, H], N the rows of an expert: 2I, or I of an activation without a gate
    bias_ptr,  # [E, N] or unused
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
    STRIDE_E: tl.constexpr,  # of weight_ptr; one of the other two is 1
    STRIDE_N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    HAS_GATE: tl.constexpr = ACTIVATION != "relu2"
    # a program multiplies with one block of neighbouring rows of the weight, or with one of the gate and one of up
    TWO_BLOCKS: tl.constexpr = HAS_GATE and not INTERLEAVED
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    # neighbouring columns that are neighbours in memory: a minimum would make loads narrow
    MASK_N: tl.constexpr = STRIDE_N == 1 and STRIDE_K != 1 and I % BLOCK_N != 0
    tile, block = _tile_and_block(num_tiles, tl.cdiv(I, BLOCK_N), GROUP_M)
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    end = tl.load(tile_end_ptr + tile)
    row = tl.load(tile_first_ptr + tile) + tl.arange(0, BLOCK_M)
    # rows past the end read the last row again: no mask in the loop, and no other expert's token
    token = (tl.load(order_ptr + tl.minimum(row, end - 1)) // top_k).to(tl.int64)
    column = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    read = (block * (STEP * BLOCK_N) + tl.arange(0, STEP * BLOCK_N)).to(tl.int64)
    # likewise for columns past I
    if I % BLOCK_N != 0 and not MASK_N:
        read = tl.minimum(read, STEP * I - 1)
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = hidden_ptr + token[:, None] * stride_token + inner[None, :]
    gate_ptrs = _weight_ptrs(weight_ptr, expert, read, inner, STRIDE_E, STRIDE_N, STRIDE_K)
    bias_ptrs = bias_ptr + expert * (2 * I if HAS_GATE else I) + read
    gate = _start(bias_ptrs, read, STEP * I, HAS_BIAS, BLOCK_M, STEP * BLOCK_N)
    if TWO_BLOCKS:
        up_ptrs = gate_ptrs + I * STRIDE_N
        up = _start(bias_ptrs + I, read, I, HAS_BIAS, BLOCK_M, BLOCK_N)
    for k in range(0, H, BLOCK_K):
        if H % BLOCK_K:
            x = tl.load(x_ptrs, mask=inner[None, :] < H - k, other=0.0)
        else:
            x = tl.load(x_ptrs)
        gate_weight = _load_weight(gate_ptrs, read, inner, H - k, STEP * I, MASK_N, H % BLOCK_K != 0)
        if TWO_BLOCKS:
            up_weight = _load_weight(up_ptrs, read, inner, H - k, I, MASK_N, H % BLOCK_K != 0)
        gate = tl.dot(x, gate_weight, gate, input_precision="ieee")
        if TWO_BLOCKS:
            up = tl.dot(x, up_weight, up, input_precision="ieee")
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K * STRIDE_K
        if TWO_BLOCKS:
            up_ptrs += BLOCK_K * STRIDE_K
    if INTERLEAVED:
        gate, up = tl.split(tl.reshape(gate, (BLOCK_M, BLOCK_N, 2)))
    elif not HAS_GATE:
        up = gate
    act = _activate(gate, up, ACTIVATION, LIMIT, ALPHA)
    act_ptrs = act_ptr + row.to(tl.int64)[:, None] * I + column[None, :]
    tl.store(act_ptrs, act.to(act_ptr.dtype.element_ty), mask=(row < end)[:, None] & (column < I)[None, :])


@triton.jit(do_not_specialize=["num_tiles"])
def down_kernel(
    act_ptr,  # [P, I]
    weight_ptr,  # [E, H, I]
    bias_ptr,  # [E, H] or unused
    tile_expert_ptr,  # [tiles]
    tile_first_ptr,  # [tiles]
    tile_end_ptr,  # [tiles]
    out_ptr,  # [P, H]
    num_tiles,
    H: tl.constexpr,
    I: tl.constexpr,
    STRIDE_E: tl.constexpr,  # of weight_ptr; one of the other two is 1
    STRIDE_N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    MASK_N: tl.constexpr = STRIDE_N == 1 and STRIDE_K != 1 and H % BLOCK_N != 0
    tile, block = _tile_and_block(num_tiles, tl.cdiv(H, BLOCK_N), GROUP_M)
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    end = tl.load(tile_end_ptr + tile)
    row = (tl.load(tile_first_ptr + tile) + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    read = column
    if H % BLOCK_N != 0 and not MASK_N:
        read = tl.minimum(column, H - 1)
    inner = tl.arange(0, BLOCK_K)
    act_ptrs = act_ptr + tl.minimum(row, end - 1)[:, None] * I + inner[None, :]
    weight_ptrs = _weight_ptrs(weight_ptr, expert, read, inner, STRIDE_E, STRIDE_N, STRIDE_K)
    out = _start(bias_ptr + expert * H + read, read, H, HAS_BIAS, BLOCK_M, BLOCK_N)
    for k in range(0, I, BLOCK_K):
        if I % BLOCK_K:
            act = tl.load(act_ptrs, mask=inner[None, :] < I - k, other=0.0)
        else:
            act = tl.load(act_ptrs)
        weight = _load_weight(weight_ptrs, read, inner, I - k, H, MASK_N, I % BLOCK_K != 0)
        out = tl.dot(act, weight, out, input_precision="ieee")
        act_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * STRIDE_K
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
        # a row that the host did not count was not computed
        total = tl.where(row == -2, float("nan"), total)
        # an inactive slot's weight may be anything
        weight = tl.load(weights_ptr + token * K + slot, mask=row >= 0, other=0.0).to(tl.float32)
        values = tl.load(rows_ptr + row * H + column, mask=column < tl.where(row >= 0, H, 0), other=0.0)
        total += weight * values.to(tl.float32)
    tl.store(out_ptr + token * H + column, total.to(out_ptr.dtype.element_ty), mask=column < H)


def moe_experts_triton(
    hidden: torch.Tensor,  # [T, H]
    gate_up_proj: torch.Tensor,  # [E, 2I, H], [E, I, H] of an activation without a gate
    down_proj: torch.Tensor,  # [E, H, I]
    ids: torch.Tensor,  # [T, K]
    weights: torch.Tensor,  # [T, K]
    options: ExpertOptions = SWIGLU,
) -> torch.Tensor:
    num_tokens, width = hidden.shape
    num_experts, _, intermediate = down_proj.shape
    num_slots, top_k = ids.numel(), ids.shape[1]
    if num_slots == 0:
        return hidden.new_zeros(hidden.shape)
    num_pairs = num_slots if options.max_pairs is None else min(options.max_pairs, num_slots)
    target, pairs_per_expert = device_target(hidden.device), num_pairs / num_experts
    tiles = expert_tiles(target, hidden.dtype, pairs_per_expert, width, intermediate, options.has_gate)
    order, position, *schedule = dispatch_pairs(ids, num_experts, tiles.block_m, num_pairs)
    num_tiles = schedule[0].numel()

    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    act = hidden.new_empty(num_pairs, intermediate)
    gate_up_kernel[(num_tiles * cdiv(intermediate, tiles.gate_up.block_n),)](
        hidden,
        gate_up_proj,
        gate_up_proj if options.gate_up_bias is None else options.gate_up_bias.contiguous(),
        order,
        *schedule,
        act,
        num_tiles,
        top_k,
        hidden.stride(0),
        H=width,
        I=intermediate,
        **_strides(gate_up_proj),
        **_form(options),
        BLOCK_M=tiles.block_m,
        **_launch(tiles.gate_up),
    )
    rows = hidden.new_empty(num_pairs, width)
    down_kernel[(num_tiles * cdiv(width, tiles.down.block_n),)](
        act,
        down_proj,
        down_proj if options.down_bias is None else options.down_bias.contiguous(),
        *schedule,
        rows,
        num_tiles,
        H=width,
        I=intermediate,
        **_strides(down_proj),
        HAS_BIAS=options.down_bias is not None,
        BLOCK_M=tiles.block_m,
        **_launch(tiles.down),
    )
    out = hidden.new_empty(num_tokens, width)
    block_h = combine_block(width)
    combine_kernel[(num_tokens, cdiv(width, block_h))](
        rows, position, weights.contiguous(), out, H=width, K=top_k, BLOCK_H=block_h
    )
    return out


STRIDES = ("STRIDE_E", "STRIDE_N", "STRIDE_K")


def _strides(weight: torch.Tensor) -> dict[str, int]:
    return dict(zip(STRIDES, weight.stride(), strict=True))


def _form(options: ExpertOptions) -> dict[str, object]:
    return {
        "ACTIVATION": options.activation,
        "LIMIT": options.limit,
        "ALPHA": options.alpha,
        "INTERLEAVED": options.interleaved,
        "HAS_BIAS": options.gate_up_bias is not None,
    }


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


@dataclass(frozen=True)
class _Layer:
    """Experts that a model has, for `aot_variants`.

    Attributes:
        transposed: parameters are [E, H, 2I] and [E, I, H].
        has_bias: in both GEMMs.
        is_complete: all types and row tiles are compiled; else bfloat16 alone, in the smallest and the largest tile.
    """

    num_experts: int
    top_k: int
    width: int
    intermediate: int
    activation: str = "silu"
    limit: float | None = None
    transposed: bool = False
    interleaved: bool = False
    has_bias: bool = False
    is_complete: bool = False


LAYERS = [
    _Layer(128, 8, 2048, 768, is_complete=True),  # Qwen3-MoE 30B-A3B (InternVL3.5, Qwen3-VL)
    _Layer(72, 6, 2560, 1536, is_complete=True),  # DeepSeek-VL2
    _Layer(256, 8, 2048, 512),  # Qwen3.5-35B-A3B
    _Layer(128, 8, 4096, 1408),  # GLM-4.5V
    _Layer(384, 8, 7168, 2048),  # Kimi-K2.5
    _Layer(128, 4, 4096, 2048),  # Mistral-Small-4
    _Layer(64, 6, 2560, 1664, transposed=True),  # Aria
    _Layer(32, 4, 2880, 2880, "oai", 7.0, transposed=True, interleaved=True, has_bias=True),  # gpt-oss-20b
    _Layer(128, 4, 6144, 3072, "oai", 7.0),  # MiniMax-M3
    _Layer(288, 8, 4096, 1280, "silu_clamped", 7.0),  # Step-3.7
    _Layer(288, 8, 4096, 2048, "clamped_silu", 10.0),  # GLM-5-next
    _Layer(128, 8, 2816, 704, "gelu_tanh"),  # Gemma-4-26B-A4B
    _Layer(128, 6, 2688, 1856, "relu2"),  # Nemotron-3-Nano
]
KINDS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def aot_variants() -> list[KernelVariant]:
    """Every shipped configuration, for `python -m fastmmoe_kernels.aot`."""
    variants = []
    for layer in LAYERS:
        variants += dispatch_variants(layer.num_experts)
        width, intermediate = layer.width, layer.intermediate
        for dtype, kind in KINDS.items() if layer.is_complete else [(torch.bfloat16, "*bf16")]:
            variants.append(
                KernelVariant(
                    combine_kernel,
                    {"rows_ptr": kind, "position_ptr": "*i32", "weights_ptr": "*fp32", "out_ptr": kind},
                    {"H": width, "K": layer.top_k, "BLOCK_H": combine_block(width)},
                )
            )
            for target in TILES:
                # the largest launch of each bucket
                most = most_pairs(target).values()
                for pairs_per_expert in most if layer.is_complete else (min(most), math.inf):
                    has_gate = ExpertOptions(activation=layer.activation).has_gate
                    tiles = expert_tiles(target, dtype, pairs_per_expert, width, intermediate, has_gate)
                    variants += _gemm_variants(target, kind, layer, tiles)
    return list({str(variant): variant for variant in variants}.values())


def _gemm_variants(target: str, kind: str, layer: _Layer, tiles: ExpertTiles) -> list[KernelVariant]:
    options = ExpertOptions(activation=layer.activation, limit=layer.limit, interleaved=layer.interleaved)
    width, intermediate = layer.width, layer.intermediate
    rows = 2 * intermediate if options.has_gate else intermediate
    schedule = dict.fromkeys(("tile_expert_ptr", "tile_first_ptr", "tile_end_ptr"), "*i32")
    weight = {"weight_ptr": kind, "bias_ptr": kind}
    arguments = {
        gate_up_kernel: {"hidden_ptr": kind, **weight, "order_ptr": "*i32", **schedule, "act_ptr": kind,
                         "num_tiles": "i32", "top_k": "i32", "stride_token": "i32"},
        down_kernel: {"act_ptr": kind, **weight, **schedule, "out_ptr": kind, "num_tiles": "i32"},
    }  # fmt: skip
    forms = (
        _layer_strides(rows, width, layer.transposed) | _form(options),
        _layer_strides(width, intermediate, layer.transposed),
    )
    variants = []
    for (kernel, signature), form, tile in zip(arguments.items(), forms, (tiles.gate_up, tiles.down), strict=True):
        launch = _launch(tile)
        warps_and_stages = {name: launch.pop(name) for name in ("num_warps", "num_stages")}
        constants = {"H": width, "I": intermediate, **form, "HAS_BIAS": layer.has_bias, "BLOCK_M": tiles.block_m}
        variants.append(
            KernelVariant(
                kernel,
                signature,
                constants | launch,
                **warps_and_stages,
                targets=(target,),
                is_gemm=True,
                needs_wgmma=tiles.block_m >= 64,
            )
        )
    return variants


def _layer_strides(rows: int, columns: int, transposed: bool) -> dict[str, int]:
    inner = (1, rows) if transposed else (columns, 1)
    return dict(zip(STRIDES, (rows * columns, *inner), strict=True))
