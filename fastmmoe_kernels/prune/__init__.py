"""One prune stage: merge the most redundant windows, keep the most important tokens (paper 3.3; method 2.5-2.7)."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastmmoe_kernels.backend import resolve_backend
from fastmmoe_kernels.checks import FLOATS, check_choice, check_int, check_tensor
from fastmmoe_kernels.layout import VisionLayout, check_prune_ratios
from fastmmoe_kernels.library import register
from fastmmoe_kernels.prune.arguments import PruneArguments
from fastmmoe_kernels.prune.reference import prune_batch_reference
from fastmmoe_kernels.redundancy import check_layout, check_redundancy_settings, window_scores
from fastmmoe_kernels.redundancy.reference import window_head

MERGE_METHODS = ("mlerp", "mean")
KEEP_BY = ("importance", "redundancy")


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


class PrunedBatch(NamedTuple):
    """A batch after a prune stage, with what the layers behind it need.

    Attributes:
        hidden, residual, merged, layout: as in `PruneOutput`.
        index: int64 [B, n'], source position of each token (a merged token's is its window's first), counted in the
            earlier sequence when `source` was given; -1 at padding.
        valid: bool [B, n'], false at padding.
    """

    hidden: torch.Tensor
    residual: torch.Tensor
    index: torch.Tensor
    merged: torch.Tensor
    layout: VisionLayout
    valid: torch.Tensor


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
    """Shorten a batch at a prune layer (method section 2): `prune_batch` on the streams alone, with its arguments."""
    pruned = prune_batch(
        hidden, residual, probs, importance, layout, keep_ratio=keep_ratio, merge_ratio=merge_ratio, window=window,
        alpha=alpha, strategy=strategy, merge_method=merge_method, backend=backend,
    )  # fmt: skip
    return PruneOutput(pruned.hidden, pruned.residual, pruned.index, pruned.merged, pruned.layout)


def prune_batch(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    probs: torch.Tensor,
    importance: torch.Tensor,
    layout: VisionLayout,
    *,
    source: torch.Tensor | None = None,
    keep_ratio: float | None = None,
    targets: Sequence[int] | None = None,
    merge_ratio: float,
    window: int,
    alpha: float,
    strategy: str,
    keep_by: str = "importance",
    merge_method: str,
    backend: str = "auto",
) -> PrunedBatch:
    """Shorten a batch at a prune layer (method section 2). No host read: all shapes follow from `layout`'s counts.

    A sample with at most one vision token, or whose target is no smaller than its number of vision tokens, keeps all
    of its tokens. Padding of the input is dropped as far as the longest sample allows.

    NaN is the largest score, as in torch.sort: a window with a NaN redundancy is merged first, a token with a NaN
    importance kept first, so that NaN does not vanish; ties go to the earlier. NaN in a token of a merged window is in
    the merged token (an infinity too; with "mlerp" either makes all features NaN), nowhere else. Merges are computed in
    float32; a result beyond float16 is infinite. "mlerp": vectors longer than 1e19 overflow to NaN; those that are zero
    or cancel exactly merge to zero, as a mean counts as 1e-10 long at least; where they cancel but for rounding, the
    direction is that of the rounding.

    Args:
        hidden: floating [B, n, H], normed hidden states (the MoE's input).
        residual: floating [B, n, H], the residual stream; merged by itself.
        probs: float32 [B, n, E], the gate's probabilities at this layer.
        importance: float32 [B, n], attention probability from the sample's last token to each token; not -inf, which
            would never be kept.
        layout: where the vision tokens are.
        source: int64 [B, n], position of each token in an earlier, longer sequence (behind an earlier stage, that
            stage's `index`); None when the tokens are that sequence.
        keep_ratio: share of the vision tokens entering this stage that survive, in (0, 1].
        targets: in place of `keep_ratio`, how many vision tokens of each sample survive; `merge_ratio` has to be 0.
        merge_ratio: share of the survivors that are merged windows, in [0, 1].
        window, alpha, strategy: as in `window_redundancy`.
        keep_by: what ranks the tokens outside merged windows: "importance" (method 2.6), or "redundancy", which keeps
            those whose window has the smallest C (**ours**; ties go to the earlier token).
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
    if source is not None:
        check_tensor("source", source, (batch, n), (torch.int64,), layout.device)
    if (keep_ratio is None) == (targets is None):
        raise ValueError(f"keep_ratio={keep_ratio}, targets={targets}: expected one of the two")
    check_prune_ratios(1.0 if keep_ratio is None else keep_ratio, merge_ratio, window)
    if targets is not None:
        _check_targets(targets, layout, merge_ratio)
    check_redundancy_settings(window, alpha, strategy)
    check_choice("keep_by", keep_by, KEEP_BY)
    check_choice("merge_method", merge_method, MERGE_METHODS)
    backend = resolve_backend(backend, hidden)

    if targets is None:
        counts = layout.prune_counts(keep_ratio, merge_ratio, window)
    else:
        counts = layout.counts_of(tuple(targets))
    table = layout.device_table(
        (
            layout.starts,
            layout.lengths,
            counts.targets,
            counts.most_merged,
            tuple(counts.width - length if layout.padding_side == "left" else 0 for length in counts.lengths),
        )
    )
    _, _, redundancy, windows = window_scores(
        probs, importance, layout.run_rank, window, float(alpha), strategy, backend
    )
    if keep_by == "redundancy":
        importance = -token_redundancy(redundancy, layout.run_rank, window)
    elif strategy == "routing_similarity":
        importance = torch.linalg.vector_norm(probs, dim=-1)
    stage = PruneArguments(
        hidden, residual, importance, redundancy, windows, layout.run_rank, table, source, counts.width,
        max(counts.most_merged, default=0), window, merge_method,
    )  # fmt: skip
    short_hidden, short_residual, index, merged, valid, run_rank = _prune_batch(*stage, backend)
    short = dataclasses.replace(
        layout, width=counts.width, lengths=counts.lengths, n_vision=counts.targets, run_rank=run_rank
    )
    return PrunedBatch(short_hidden, short_residual, index, merged, short, valid)


def token_redundancy(redundancy: torch.Tensor, run_rank: torch.Tensor, window: int) -> torch.Tensor:
    """Every vision token's C: that of its window, float32 [B, n]; 0 at other tokens. Both arguments are [B, n]."""
    return torch.where(run_rank >= 0, redundancy.gather(1, window_head(run_rank, window)), 0.0)


def _check_targets(targets: Sequence[int], layout: VisionLayout, merge_ratio: float) -> None:
    """Refuse anything but a possible count for every sample, without merging."""
    if len(targets) != layout.batch_size:
        raise ValueError(f"targets: expected {layout.batch_size} counts, got {len(targets)}")
    for sample, (target, n_vision) in enumerate(zip(targets, layout.n_vision, strict=True)):
        check_int(f"targets[{sample}]", target, 0, n_vision)
    if merge_ratio > 0:
        raise ValueError(f"merge_ratio: expected 0 with targets, got {merge_ratio}")


def _fake(stage):
    hidden, residual, run_rank, width = stage.hidden, stage.residual, stage.run_rank, stage.width
    batch, _, features = hidden.shape
    return (
        hidden.new_empty(batch, width, features),
        residual.new_empty(batch, width, features),
        run_rank.new_empty(batch, width, dtype=torch.int64),
        run_rank.new_empty(batch, width, dtype=torch.bool),
        run_rank.new_empty(batch, width, dtype=torch.bool),
        run_rank.new_empty(batch, width),
    )


_prune_batch = register("prune_batch", prune_batch_reference, "fastmmoe_kernels.prune.kernel:prune_batch_triton", _fake)
