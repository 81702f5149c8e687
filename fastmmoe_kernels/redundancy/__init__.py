"""Redundancy of windows of vision tokens: alike in routing, little attended to (paper section 3.3; method 2.2-2.4)."""

import torch

from fastmmoe_kernels.backend import resolve_backend
from fastmmoe_kernels.checks import check_choice, check_float, check_int, check_tensor
from fastmmoe_kernels.layout import MOST_TOKENS, VisionLayout
from fastmmoe_kernels.library import register
from fastmmoe_kernels.redundancy.reference import window_scores_reference

STRATEGIES = ("hybrid", "routing_similarity", "dynamic_attention")


def window_redundancy(
    probs: torch.Tensor,
    importance: torch.Tensor,
    layout: VisionLayout,
    *,
    window: int,
    alpha: float,
    strategy: str,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score every window of the batch (method sections 2.2 to 2.4).

    The cosine with a token of zeros is 0: products of norms count as 1e-20 at least. NaN or an infinity in a token's
    probabilities makes the S of its window NaN, a NaN importance the A of its window. A is relative to the largest
    number among the sample's windows, so that no other window changes; next to an importance of inf, whose A is NaN, it
    is 0.

    Args:
        probs: float32 [B, n, E], the gate's probabilities at this layer; only vision tokens are read.
        importance: float32 [B, n], attention probability from the sample's last token; only vision tokens are read.
        layout: where the vision tokens are.
        window: tokens per window, 1 to 2**30; windows do not cross the end of a run of vision tokens.
        alpha: weight of the routing similarity under "hybrid", in [0, 1].
        strategy: "hybrid" (C = alpha * S - (1 - alpha) * A), "routing_similarity" (C = S) or
            "dynamic_attention" (C = -A).
        backend: "auto", "triton" or "torch".

    Returns:
        (S, A, C), each float32 [total windows] in batch and sequence order: routing similarity, attention importance
        relative to the sample's most important window, redundancy. Finding the windows reads the layout on the host.

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype, device or range; names the argument.
    """
    check_layout("layout", layout, importance)
    check_tensor("importance", importance, (layout.batch_size, layout.width), (torch.float32,), layout.device)
    check_tensor("probs", probs, (layout.batch_size, layout.width, "E"), (torch.float32,), layout.device)
    check_redundancy_settings(window, alpha, strategy)
    similarity, attention, redundancy, _ = window_scores(
        probs, importance, layout.run_rank, window, float(alpha), strategy, resolve_backend(backend, probs)
    )
    heads = [
        sample * layout.width + members[0]
        for sample, windows in enumerate(layout.windows(window))
        for members in windows
    ]
    head = torch.tensor(heads, dtype=torch.int64).to(probs.device)
    return similarity.flatten()[head], attention.flatten()[head], redundancy.flatten()[head]


def check_layout(name: str, layout: object, tensor: object) -> None:
    """Refuse anything but a `VisionLayout` on the device of `tensor`."""
    if not isinstance(layout, VisionLayout):
        raise TypeError(f"{name}: expected a VisionLayout, got {type(layout).__name__}")
    if isinstance(tensor, torch.Tensor) and layout.device != tensor.device:
        raise ValueError(f"{name}: expected a layout on {tensor.device}, got one on {layout.device}; use layout.to()")


def check_redundancy_settings(window: int, alpha: float, strategy: str) -> None:
    """Refuse a `window`, `alpha` or `strategy` out of range."""
    check_int("window", window, 1, MOST_TOKENS)
    check_float("alpha", alpha, 0.0, 1.0)
    check_choice("strategy", strategy, STRATEGIES)


def _fake(probs, importance, run_rank, window, alpha, strategy):
    return (
        *(torch.empty_like(run_rank, dtype=torch.float32) for _ in range(3)),
        run_rank.new_empty(run_rank.shape[0]),
    )


window_scores: torch._ops.OpOverload = register(
    "window_scores", window_scores_reference, "fastmmoe_kernels.redundancy.kernel:window_scores_triton", _fake
)
