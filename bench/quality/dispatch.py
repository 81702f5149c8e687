"""The experts of a training step on a CPU, without transformers' loop over masks.

Pairs of token and expert are sorted by expert; each expert then multiplies one contiguous slice. Rows move by gathers
alone, in the backward pass too: a permutation's inverse is at hand, and scattering is slow on a CPU.
"""

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "sorted"


class _Spread(torch.autograd.Function):
    """[T, H] -> [T * K, H], every token once per expert, in the order of `order`."""

    @staticmethod
    def forward(ctx, hidden, order, inverse, top_k):
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return hidden[order // top_k]

    @staticmethod
    def backward(ctx, gradient):
        (inverse,) = ctx.saved_tensors
        return gradient[inverse].unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Restore(torch.autograd.Function):
    """[T * K, H] in the order of `order` -> token by token."""

    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(order)
        return rows[inverse]

    @staticmethod
    def backward(ctx, gradient):
        (order,) = ctx.saved_tensors
        return gradient[order], None, None


class _GroupedLinear(torch.autograd.Function):
    """[R, I] -> [R, O]: `sizes[e]` rows in a row go through `weight[e]`, of [E, O, I]."""

    @staticmethod
    def forward(ctx, rows, weight, sizes):
        ctx.save_for_backward(rows, weight)
        ctx.sizes = sizes
        out = rows.new_empty(len(rows), weight.shape[1])
        for part, result, matrix in zip(rows.split(sizes), out.split(sizes), weight, strict=True):
            torch.mm(part, matrix.T, out=result)
        return out

    @staticmethod
    def backward(ctx, gradient):
        rows, weight = ctx.saved_tensors
        to_rows, to_weight = torch.empty_like(rows), torch.empty_like(weight)
        parts = (tensor.split(ctx.sizes) for tensor in (rows, gradient, to_rows))
        for part, incoming, result, matrix, change in zip(*parts, weight, to_weight, strict=True):
            torch.mm(incoming, matrix, out=result)
            torch.mm(incoming.T, part, out=change)
        return to_rows, to_weight, None


def sorted_experts(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run a transformers experts module: [T, H], [T, K], [T, K] -> [T, H]."""
    top_k = top_k_index.shape[1]
    flat = top_k_index.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    sizes = flat.bincount(minlength=experts.num_experts).tolist()
    rows = _Spread.apply(hidden_states, order, inverse, top_k)
    gate, up = _GroupedLinear.apply(rows, experts.gate_up_proj, sizes).chunk(2, -1)
    rows = _GroupedLinear.apply(nn.functional.silu(gate) * up, experts.down_proj, sizes)
    rows = _Restore.apply(rows, order, inverse).unflatten(0, (-1, top_k))
    return (top_k_weights.unsqueeze(1) @ rows).squeeze(1)


ALL_EXPERTS_FUNCTIONS.register(NAME, sorted_experts)
