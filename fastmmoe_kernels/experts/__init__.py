"""The experts of a mixture-of-experts layer, for tokens that activate different numbers of them."""

import torch

from fastmmoe_kernels.backend import resolve_backend
from fastmmoe_kernels.checks import FLOATS, check_tensor, check_unit_stride
from fastmmoe_kernels.experts.options import DEFAULT_ALPHA, ExpertOptions
from fastmmoe_kernels.experts.reference import moe_experts_reference
from fastmmoe_kernels.library import register


def moe_experts(
    hidden: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    activation: str = "silu",
    limit: float | None = None,
    alpha: float = DEFAULT_ALPHA,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    interleaved: bool = False,
    max_pairs: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Each token's weighted sum of its experts: `sum_k weights[t, k] * down(act(gate(x_t), up(x_t)))`.

    A slot whose id is no expert (negative, or >= E as `topk_routing` writes into inactive slots) is skipped: it costs
    nothing, and a token with no active slot yields zeros. Products accumulate in float32, as does the sum over slots.

    NaN or an infinity in a token, in the weight of an active slot, or in an expert is in the tokens that it belongs to
    (no clamp hides NaN, and 0 times NaN is NaN), nowhere else: an inactive slot's weight and an expert that no token
    activates may hold anything. An expert that all tokens activate is none but a busy one. Activations and experts'
    outputs are rounded to hidden's dtype, in the torch backend the first product too, behind its bias: beyond float16
    they are infinite, and NaN where infinities are added up; what is denormal in a 16-bit type may be lost.

    The weights may be views with any strides, of which one in the last two dimensions is 1: a parameter [E, H, 2I] is
    handed in as `.mT`. They are not copied.

    Activations, of g = gate(x) and u = up(x), with L the limit:
        "silu": silu(g) * u.
        "clamped_silu": silu(min(g, L)) * clamp(u, -L, L).
        "silu_clamped": min(silu(g), L) * clamp(u, -L, L).
        "oai": g * sigmoid(alpha * g) * (u + 1), of g = min(g, L) and u = clamp(u, -L, L).
        "gelu_tanh": gelu(g) * u, gelu in its tanh approximation.
        "relu2": relu(u)^2; there is no gate.

    Args:
        hidden: float32, float16 or bfloat16 [T, H].
        gate_up_proj: hidden's dtype [E, 2I, H], each expert's I gate rows first, then its I up rows; [E, I, H] where
            there is no gate.
        down_proj: hidden's dtype [E, H, I].
        ids: int32 or int64 [T, K], expert per slot.
        weights: float32, float16 or bfloat16 [T, K].
        activation: one of the above.
        limit: L > 0 of the clamped activations and of "oai"; None for the others.
        alpha: of "oai".
        gate_up_bias: hidden's dtype or float32, one per row of `gate_up_proj`: [E, 2I] or [E, I]; added in float32.
        down_bias: hidden's dtype or float32 [E, H], added in float32 before the weight multiplies.
        interleaved: rows of `gate_up_proj`, and its bias, alternate: gate 0, up 0, gate 1, up 1, ...
        max_pairs: the most slots that are active, if the host knows it: less memory, a grid and tiles that fit; None:
            T * K. Where more are active, those of the last experts are not computed, and their tokens yield NaN.
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
    check_unit_stride("down_proj", down_proj)
    num_experts, _, intermediate = down_proj.shape
    options = ExpertOptions(gate_up_bias, down_bias, activation, limit, alpha, interleaved, max_pairs)
    options.check(hidden, num_experts, intermediate)
    rows = 2 * intermediate if options.has_gate else intermediate
    check_tensor("gate_up_proj", gate_up_proj, (num_experts, rows, width), (hidden.dtype,), hidden.device)
    check_unit_stride("gate_up_proj", gate_up_proj)
    check_tensor("ids", ids, (num_tokens, "K"), (torch.int32, torch.int64), hidden.device)
    check_tensor("weights", weights, (num_tokens, ids.shape[1]), FLOATS, hidden.device)
    return _moe_experts(hidden, gate_up_proj, down_proj, ids, weights, *options, resolve_backend(backend, hidden))


def _fake(hidden, gate_up_proj, down_proj, ids, weights, options):
    return hidden.new_empty(hidden.shape)


_moe_experts = register(
    "moe_experts", moe_experts_reference, "fastmmoe_kernels.experts.kernel:moe_experts_triton", _fake
)
