"""The experts in PyTorch: the definition, and the CPU path."""

import math

import torch
import torch.nn.functional as F

# rows of one expert that are worked on at a time: their activations stay in the cache, in buffers that are used again
# and again (touching fresh memory costs more than the arithmetic on it)
ROWS = 512
# column blocks of a product with an expert's weights: BLAS leaves cores idle on one product of few rows, but not on a
# batch of them
BLOCKS = 4


def moe_experts_reference(
    hidden: torch.Tensor,  # [T, H]
    gate_up_proj: torch.Tensor,  # [E, 2I, H]
    down_proj: torch.Tensor,  # [E, H, I]
    ids: torch.Tensor,  # [T, K]
    weights: torch.Tensor,  # [T, K]
) -> torch.Tensor:
    num_experts, width, intermediate = down_proj.shape
    expert = ids.flatten()
    expert = torch.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    expert, order = expert.sort(stable=True)
    token = order // ids.shape[1]  # [P], pairs of token and slot, expert by expert
    weight = weights.flatten()[order].float().unsqueeze(1)  # [P, 1]
    # on a GPU the host waits here for the counts; the Triton backend does not
    counts = expert.bincount(minlength=num_experts)[:num_experts].tolist()

    gate_up_proj = _split_columns(gate_up_proj)  # [E, B, H, 2I / B], the gate's blocks first
    down_proj = _split_columns(down_proj)  # [E, B, I, H / B]
    out = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    rows = min(ROWS, max(counts, default=0))
    x_buffer = hidden.new_empty(rows, width)
    act_buffer = hidden.new_empty(rows, intermediate)
    weighted_buffer = out.new_empty(rows, width)
    product_buffer = hidden.new_empty(rows * max(2 * intermediate, width))
    end = 0
    for e, count in enumerate(counts):
        start, end = end, end + count
        for first in range(start, end, ROWS):
            last = min(first + ROWS, end)
            n = last - first
            x = torch.index_select(hidden, 0, token[first:last], out=x_buffer[:n])
            gate, up = _matmul(x, gate_up_proj[e], product_buffer).chunk(2)
            act = act_buffer[:n]
            torch.mul(F.silu(gate, inplace=True), up, out=act.view(n, len(gate), -1).transpose(0, 1))
            y = _matmul(act, down_proj[e], product_buffer)
            weighted = weighted_buffer[:n]
            torch.mul(y, weight[first:last], out=weighted.view(n, len(y), -1).transpose(0, 1))
            # expert by expert, and within one no row twice unless a token names it twice: repeatable, on a GPU too
            out.index_add_(0, token[first:last], weighted)
    return out.to(hidden.dtype)


def _split_columns(weight: torch.Tensor) -> torch.Tensor:
    """[E, columns, inner] as [E, B, inner, columns / B]."""
    return weight.unflatten(1, (math.gcd(BLOCKS, weight.shape[1]), -1)).mT


def _matmul(x: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """[n, inner] times [B, inner, columns / B], in `buffer`: [B, n, columns / B]."""
    blocks, _, columns = weight.shape
    out = buffer[: blocks * len(x) * columns].view(blocks, len(x), columns)
    return torch.bmm(x.expand(blocks, *x.shape), weight, out=out)
