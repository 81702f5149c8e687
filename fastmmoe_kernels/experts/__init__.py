"""The experts of a mixture-of-experts layer, for tokens that activate different numbers of them."""

import torch

from fastmmoe_kernels.backend import resolve_backend
from fastmmoe_kernels.checks import FLOATS, check_choice, check_tensor
from fastmmoe_kernels.experts.reference import moe_experts_reference
from fastmmoe_kernels.library import register

ACTIVATIONS = ("silu",)


def moe_experts(
    hidden: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    activation: str = "silu",
    backend: str = "auto",
) -> torch.Tensor:
    """Each token's weighted sum of its experts: `sum_k weights[t, k] * down(silu(gate(x_t)) * up(x_t))`.

    A slot whose id is no expert (negative, or >= E as `topk_routing` writes into inactive slots) is skipped: it costs
    nothing, and a token with no active slot yields zeros. Products accumulate in float32, as does the sum over slots.

    Args:
        hidden: float32, float16 or bfloat16 [T, H].
        gate_up_proj: hidden's dtype [E, 2I, H], each expert's I gate rows first, then its I up rows.
        down_proj: hidden's dtype [E, H, I].
        ids: int32 or int64 [T, K], expert per slot.
        weights: float32, float16 or bfloat16 [T, K].
        activation: "silu".
        backend: "auto", "triton" or "torch".

    Returns:
        [T, H] in hidden's dtype.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype, device or range; names the argument.
        RuntimeError: `backend="triton"` where Triton cannot run.
    """
    check_tensor("hidden", hidden, ("T", "H"), FLOATS)
    num_tokens, width = hidden.shape
    check_tensor("down_proj", down_proj, ("E", width, "I"), (hidden.dtype,), hidden.device)
    num_experts, _, intermediate = down_proj.shape
    check_tensor("gate_up_proj", gate_up_proj, (num_experts, 2 * intermediate, width), (hidden.dtype,), hidden.device)
    check_tensor("ids", ids, (num_tokens, "K"), (torch.int32, torch.int64), hidden.device)
    check_tensor("weights", weights, (num_tokens, ids.shape[1]), FLOATS, hidden.device)
    check_choice("activation", activation, ACTIVATIONS)
    return _moe_experts(hidden, gate_up_proj, down_proj, ids, weights, resolve_backend(backend, hidden))


def _fake(hidden, gate_up_proj, down_proj, ids, weights):
    return hidden.new_empty(hidden.shape)


_moe_experts = register(
    "moe_experts", moe_experts_reference, "fastmmoe_kernels.experts.kernel:moe_experts_triton", _fake
)
