"""The experts in PyTorch: the definition, and the CPU path."""

import math

import torch
import torch.nn.functional as F

# rows of one expert that are worked on at a time: their activations stay in the cache, in buffers that are used again
# and again (touching fresh memory costs more than the arithmetic on it)
ROWS = 512
# column blocks of a product with an expert's weights
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

    out = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    rows = min(ROWS, max(counts, default=0))
    x_buffer, y_buffer = (hidden.new_empty(rows * width) for _ in range(2))
    gate_up_buffer = hidden.new_empty(rows * 2 * intermediate)
    act_buffer = hidden.new_empty(rows * intermediate)
    weighted_buffer = out.new_empty(rows * width)
    end = 0
    for e, count in enumerate(counts):
        start, end = end, end + count
        for first in range(start, end, ROWS):
            pair = slice(first, min(first + ROWS, end))
            n = pair.stop - first
            x = torch.index_select(hidden, 0, token[pair], out=x_buffer[: n * width].view(n, width))
            gate, up = _matmul(x, gate_up_proj[e], gate_up_buffer).chunk(2)  # [blocks, n, I / blocks]
            act = act_buffer[: n * intermediate].view(n, intermediate)
            torch.mul(F.silu(gate, inplace=True), up, out=_by_blocks(act, len(gate)))
            y = _matmul(act, down_proj[e], y_buffer)
            weighted = weighted_buffer[: n * width].view(n, width)
            torch.mul(y, weight[pair], out=_by_blocks(weighted, len(y)))
            out.index_add_(0, token[pair], weighted)
    return out.to(hidden.dtype)


def _matmul(x: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T`, in `buffer`, as blocks of columns [blocks, n, columns / blocks].

    BLAS leaves most cores idle on a product of few rows, but not on a batch of them.
    """
    (n, inner), columns = x.shape, len(weight)
    blocks = math.gcd(BLOCKS, columns)
    out = buffer[: n * columns].view(blocks, n, columns // blocks)
    return torch.bmm(x.expand(blocks, n, inner), weight.unflatten(0, (blocks, -1)).mT, out=out)


def _by_blocks(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """[n, columns] as [blocks, n, columns / blocks]."""
    return x.unflatten(1, (blocks, -1)).transpose(0, 1)
