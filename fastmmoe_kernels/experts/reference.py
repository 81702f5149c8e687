"""The experts in PyTorch: the definition, and the CPU path."""

import torch
import torch.nn.functional as F

# rows of one expert that are worked on at a time: their activations stay in the cache, in buffers that are used again
# and again (fresh memory costs more than the arithmetic on it)
ROWS = 256
# BLAS is faster with the weights as its left operand, although the result then comes out transposed, up to here
FEW_ROWS = 192


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
    token = order // ids.shape[1]  # [pairs], tokens expert by expert
    weight = weights.flatten()[order].float().unsqueeze(1)
    # on a GPU the host waits here for the counts; the Triton backend does not
    counts = expert.bincount(minlength=num_experts)[:num_experts].tolist()

    out = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    rows = min(ROWS, max(counts))
    x_buffer = hidden.new_empty(rows * width)
    gate_up_buffer = hidden.new_empty(rows * 2 * intermediate)
    act_buffer = hidden.new_empty(rows * intermediate)
    y_buffer = hidden.new_empty(rows * width)
    scaled_buffer = out.new_empty(rows * width)
    end = 0
    for e, count in enumerate(counts):
        start, end = end, end + count
        for first in range(start, end, ROWS):
            pair = slice(first, min(first + ROWS, end))
            n = pair.stop - first
            x = torch.index_select(hidden, 0, token[pair], out=x_buffer[: n * width].view(n, width))
            gate_up = gate_up_buffer[: n * 2 * intermediate].view(2 * intermediate, n)
            gate, up = torch.mm(gate_up_proj[e], x.t(), out=gate_up).chunk(2)  # [I, n]
            gate = F.silu(gate, inplace=True)
            if n < FEW_ROWS:
                act = torch.mul(gate.t(), up.t(), out=act_buffer[: n * intermediate].view(n, intermediate))
                y = torch.mm(down_proj[e], act.t(), out=y_buffer[: n * width].view(width, n)).t()
            else:
                act = gate.mul_(up).t()
                y = torch.mm(act, down_proj[e].t(), out=y_buffer[: n * width].view(n, width))
            scaled = torch.mul(y, weight[pair], out=scaled_buffer[: n * width].view(n, width))
            out.index_add_(0, token[pair], scaled)
    return out.to(hidden.dtype)
