"""The experts in PyTorch: the definition, and the CPU path."""

import math

import torch
import torch.nn.functional as F

from fastmmoe_kernels.experts.options import ExpertOptions

# rows of one expert that are worked on at a time: their activations stay in the cache, in buffers that are used again
# and again (touching fresh memory costs more than the arithmetic on it)
ROWS = 512
# column blocks of a product with an expert's weights: BLAS leaves cores idle on one product of few rows, but not on a
# batch of them
BLOCKS = 4


def moe_experts_reference(
    hidden: torch.Tensor,  # [T, H]
    gate_up_proj: torch.Tensor,  # [E, N, H], N the rows of an expert: 2I, or I of an activation without a gate
    down_proj: torch.Tensor,  # [E, H, I]
    ids: torch.Tensor,  # [T, K]
    weights: torch.Tensor,  # [T, K]
    options: ExpertOptions,
) -> torch.Tensor:
    num_experts, width, intermediate = down_proj.shape
    gate_up_rows = gate_up_proj.shape[1]
    expert = ids.flatten()
    expert = torch.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    expert, order = expert.sort(stable=True)
    token = order // ids.shape[1]  # [P], pairs of token and slot, expert by expert
    weight = weights.flatten()[order].float().unsqueeze(1)  # [P, 1]
    # on a GPU the host waits here for the counts; the Triton backend does not
    counts = expert.bincount(minlength=num_experts)[:num_experts].tolist()

    # the gate's blocks come first; where gate and up alternate, each block has as many of one as of the other
    step = 2 if options.interleaved else 1
    gate_up_proj = _split_columns(gate_up_proj, step)  # [E, B, H, N / B]
    gate_up_bias = _split_bias(options.gate_up_bias, step)  # [E, B, 1, N / B]
    down_proj = _split_columns(down_proj)  # [E, B, I, H / B]
    down_bias = _split_bias(options.down_bias)  # [E, B, 1, H / B]
    out = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    rows = min(ROWS, max(counts, default=0))
    x_buffer = hidden.new_empty(rows, width)
    act_buffer = hidden.new_empty(rows, intermediate)
    weighted_buffer = out.new_empty(rows, width)
    product_buffer = hidden.new_empty(rows * max(gate_up_rows, width))
    end = 0
    for e, count in enumerate(counts):
        start, end = end, end + count
        for first in range(start, end, ROWS):
            last = min(first + ROWS, end)
            n = last - first
            x = torch.index_select(hidden, 0, token[first:last], out=x_buffer[:n])
            gate_up = _matmul(x, gate_up_proj[e], product_buffer, None if gate_up_bias is None else gate_up_bias[e])
            act = act_buffer[:n]
            activate(gate_up, options, act)
            y = _matmul(act, down_proj[e], product_buffer, None if down_bias is None else down_bias[e])
            weighted = weighted_buffer[:n]
            torch.mul(y, weight[first:last], out=weighted.view(n, len(y), -1).transpose(0, 1))
            # expert by expert, and within one no row twice unless a token names it twice: repeatable, on a GPU too
            out.index_add_(0, token[first:last], weighted)
    if options.max_pairs is not None:
        out[token[options.max_pairs : end]] = float("nan")
    return out.to(hidden.dtype)


def activate(gate_up: torch.Tensor, options: ExpertOptions, act: torch.Tensor) -> None:
    """[B, n, N / B] to [n, I], in `act`; may write into `gate_up`."""
    gate_up = gate_up.float()  # as in the kernel, an activation is rounded once
    if not options.has_gate:
        out = act.view(len(act), len(gate_up), -1).transpose(0, 1)
        torch.square(F.relu(gate_up, inplace=True), out=out)
        return
    gate, up = (gate_up[..., ::2], gate_up[..., 1::2]) if options.interleaved else gate_up.chunk(2)
    out = act.view(len(act), len(gate), -1).transpose(0, 1)
    activation, limit = options.activation, options.limit
    if activation == "silu":
        torch.mul(F.silu(gate, inplace=True), up, out=out)
    elif activation == "gelu_tanh":
        torch.mul(F.gelu(gate, approximate="tanh"), up, out=out)
    elif activation == "clamped_silu":
        torch.mul(F.silu(gate.clamp_(max=limit), inplace=True), up.clamp_(-limit, limit), out=out)
    elif activation == "silu_clamped":
        torch.mul(F.silu(gate, inplace=True).clamp_(max=limit), up.clamp_(-limit, limit), out=out)
    else:  # "oai"
        gate = gate.clamp_(max=limit)
        torch.mul(gate * torch.sigmoid(options.alpha * gate), up.clamp_(-limit, limit).add_(1.0), out=out)


def _split_columns(weight: torch.Tensor, step: int = 1) -> torch.Tensor:
    """[E, columns, inner] as [E, B, inner, columns / B], each block a multiple of `step` columns; a view."""
    return weight.unflatten(1, (math.gcd(BLOCKS, weight.shape[1] // step), -1)).mT


def _split_bias(bias: torch.Tensor | None, step: int = 1) -> torch.Tensor | None:
    """[E, columns] as [E, B, 1, columns / B], in the blocks of `_split_columns`."""
    return None if bias is None else _split_columns(bias.unsqueeze(2), step)


def _matmul(x: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[n, inner] times [B, inner, columns / B] plus [B, 1, columns / B], in `buffer`: [B, n, columns / B].

    A product that a bias may cancel is not rounded before the sum, as in the kernel.
    """
    blocks, _, columns = weight.shape
    x, out = x.expand(blocks, *x.shape), buffer[: blocks * len(x) * columns].view(blocks, len(x), columns)
    if bias is None:
        return torch.bmm(x, weight, out=out)
    if bias.dtype == x.dtype:
        return torch.baddbmm(bias, x, weight, out=out)
    return torch.bmm(x.float(), weight.float()).add_(bias)
