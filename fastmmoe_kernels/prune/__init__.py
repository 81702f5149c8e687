"""One prune stage: merge the most redundant windows, keep the most important tokens (paper 3.3; method 2.5-2.7)."""

import dataclasses
from typing import NamedTuple

import torch

from fastmmoe_kernels.backend import resolve_backend
from fastmmoe_kernels.checks import FLOATS, check_choice, check_tensor
from fastmmoe_kernels.layout import VisionLayout, check_prune_ratios, device_table
from fastmmoe_kernels.prune.reference import prune_tokens_reference
from fastmmoe_kernels.redundancy import check_layout, check_redundancy_settings, window_scores

MERGE_METHODS = ("mlerp", "mean")


class PruneOutput(NamedTuple):
    """A batch after a prune stage, for B samples of which the longest keeps n' tokens.

    Attributes:
        hidden, residual: [B, n', H], padded on the input's padding side with zeros, in the input's dtypes.
        index: int64 [B, n'], source position of each token (a merged token's is its window's first); -1 at padding.
        merged: bool [B, n'], true at tokens that stand for a merged window.
        layout: `VisionLayout` of the shorter batch.
    """

    hidden: torch.Tensor
    residual: torch.Tensor
    index: torch.Tensor
    merged: torch.Tensor
    layout: VisionLayout


def prune_tokens(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    probs: torch.Tensor,
    importance: torch.Tensor,
    layout: VisionLayout,
    *,
    keep_ratio: float,
    merge_ratio: float,
    window: int,
    alpha: float,
    strategy: str,
    merge_method: str,
    backend: str = "auto",
) -> PruneOutput:
    """Shorten a batch at a prune layer (method section 2). No host read: all shapes follow from `layout`'s counts.

    A sample with at most one vision token, or whose target is no smaller than its number of vision tokens, keeps all
    of its tokens. Padding of the input is dropped as far as the longest sample allows.

    Args:
        hidden: floating [B, n, H], normed hidden states (the MoE's input).
        residual: floating [B, n, H], the residual stream; merged by itself.
        probs: float32 [B, n, E], the gate's probabilities at this layer.
        importance: float32 [B, n], attention probability from the sample's last token to each token.
        layout: where the vision tokens are.
        keep_ratio: share of the vision tokens entering this stage that survive, in (0, 1].
        merge_ratio: share of the survivors that are merged windows, in [0, 1].
        window, alpha, strategy: as in `window_redundancy`.
        merge_method: "mlerp" (mean direction, largest norm) or "mean".
        backend: "auto", "triton" or "torch".

    Raises:
        TypeError, ValueError: an argument of another type, shape, dtype, device or range; names the argument.
    """
    check_layout("layout", layout, hidden)
    batch, n = layout.batch_size, layout.width
    check_tensor("hidden", hidden, (batch, n, "H"), FLOATS, layout.device)
    check_tensor("residual", residual, (batch, n, hidden.shape[2]), FLOATS, layout.device)
    check_tensor("probs", probs, (batch, n, "E"), (torch.float32,), layout.device)
    check_tensor("importance", importance, (batch, n), (torch.float32,), layout.device)
    check_prune_ratios(keep_ratio, merge_ratio, window)
    check_redundancy_settings(window, alpha, strategy)
    check_choice("merge_method", merge_method, MERGE_METHODS)
    backend = resolve_backend(backend, hidden)

    counts = layout.prune_counts(keep_ratio, merge_ratio, window)
    table = device_table(
        (
            layout.starts,
            layout.lengths,
            counts.targets,
            counts.most_merged,
            tuple(counts.width - length if layout.padding_side == "left" else 0 for length in counts.lengths),
        ),
        layout.device,
    )
    _, _, redundancy, windows = window_scores(
        probs, importance, layout.run_rank, window, float(alpha), strategy, backend
    )
    if strategy == "routing_similarity":
        importance = torch.linalg.vector_norm(probs, dim=-1)
    short_hidden, short_residual, index, merged, run_rank = _prune_tokens(
        hidden,
        residual,
        importance,
        redundancy,
        windows,
        layout.run_rank,
        table,
        counts.width,
        max(counts.most_merged, default=0),
        window,
        merge_method,
        backend,
    )
    short = dataclasses.replace(
        layout, width=counts.width, lengths=counts.lengths, n_vision=counts.targets, run_rank=run_rank
    )
    return PruneOutput(short_hidden, short_residual, index, merged, short)


@torch.library.custom_op("fastmmoe::prune_tokens", mutates_args=())
def _prune_tokens(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    importance: torch.Tensor,
    redundancy: torch.Tensor,
    windows: torch.Tensor,
    run_rank: torch.Tensor,
    table: torch.Tensor,
    width: int,
    most_merged: int,
    window: int,
    merge_method: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if backend == "triton":
        from fastmmoe_kernels.prune.kernel import prune_tokens_triton as run
    else:
        run = prune_tokens_reference
    return run(
        hidden, residual, importance, redundancy, windows, run_rank, table, width, most_merged, window, merge_method
    )


@_prune_tokens.register_fake
def _(hidden, residual, importance, redundancy, windows, run_rank, table, width, most_merged, window, merge_method,
      backend):  # fmt: skip
    batch, _, features = hidden.shape
    return (
        hidden.new_empty(batch, width, features),
        residual.new_empty(batch, width, features),
        run_rank.new_empty(batch, width, dtype=torch.int64),
        run_rank.new_empty(batch, width, dtype=torch.bool),
        run_rank.new_empty(batch, width),
    )
