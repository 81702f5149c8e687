"""SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417): the question's words rate the vision tokens, layer by layer.

The data's way: input embeddings -> raters -> their rows of a prune layer's attention -> scores and how many to keep ->
clusters of what is dropped -> a shorter batch. Where the paper and its v1.0 code leave a choice, ours is marked.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from fastmmoe.config import checked, int_from, number_from, optional, rising_layers, share, tuple_of
from fastmmoe.methods.attention_rows import attention_rows, last_positions
from fastmmoe.methods.entry import Entry, Place
from fastmmoe.methods.method import AttentionCall, BaselineConfig, Pruning, StageInput
from fastmmoe_kernels import PrunedBatch, VisionLayout, prune_plan


@dataclass(frozen=True)
class SparseVLMConfig(BaselineConfig):
    """SparseVLM: rank-adaptive as in v1.0, or with a fixed schedule of counts.

    Behind each of `layers` a sample keeps its best vision tokens: of n, with r the rank of the raters' attention to
    them, `min(int(rank_scale * r), n - 1)`, or all when r = n. r is data: the host waits for the device once per layer.
    A schedule (`counts` or `keep_ratios`) replaces that and waits for nothing; **ours**: it prunes nothing where it
    asks for n or more.
    Of p dropped tokens the best m = `int(recycle_ratio * p) + 1` are averaged in `int(m / tokens_per_cluster) + 1`
    clusters (the official code's rounding), which count as vision tokens from there on.

    Args:
        layers: prune layers, rising.
        counts: vision tokens that each layer keeps, recycled ones not included.
        keep_ratios: the same as a share of the vision tokens that enter, rounded as in method section 2.1.
        rank_scale: at least 1.
        recycle_ratio: share of the dropped tokens that are recycled, in [0, 1]; 0 recycles nothing.
        tokens_per_cluster: at least 1.
    """

    layers: tuple[int, ...] = checked((2, 6, 15, 19), rising_layers)
    counts: tuple[int, ...] | None = checked(None, optional(tuple_of(int_from(1))))
    keep_ratios: tuple[float, ...] | None = None
    rank_scale: float = checked(13.5, number_from(1.0))
    recycle_ratio: float = checked(0.3, share)
    tokens_per_cluster: int = checked(10, int_from(1))

    prunes_behind_layer = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise ValueError("layers=(): it would silently do nothing; expected the layers to prune behind")
        if self.counts is not None and self.keep_ratios is not None:
            raise ValueError(f"counts={self.counts} and keep_ratios={self.keep_ratios}: expected one of the two")
        for name in ("counts", "keep_ratios"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.layers):
                raise ValueError(f"{name}={values}: expected one for each of layers={self.layers}, got {len(values)}")

    @property
    def prune_layers(self) -> tuple[int, ...]:
        return self.layers

    @property
    def is_adaptive(self) -> bool:
        """Whether the counts depend on the data."""
        return self.counts is None and self.keep_ratios is None

    def pruning(self) -> Pruning:
        return _SparseVLMPruning(self)

    def check_model(self, num_hidden_layers: int, num_experts_per_tok: int) -> None:
        """As `ReductionConfig.check_model`; also refuses to prune behind the last layer."""
        if self.layers[-1] >= num_hidden_layers - 1:
            raise ValueError(
                f"layers={self.layers}: the model has {num_hidden_layers} layers, expected layers from 0 to "
                f"{num_hidden_layers - 2}, with one behind to save time in; give layers that fit this model"
            )
        super().check_model(num_hidden_layers, num_experts_per_tok)

    def counts_at(self, stage: int, n_vision: int, rank: int | None = None) -> "SparseCounts":
        """What a stage (counted from 0) does to one sample; `rank` is the raters', for rank-adaptive counts alone."""
        if self.counts is not None:
            kept = min(self.counts[stage], n_vision)
        elif self.keep_ratios is not None:
            kept = prune_plan([n_vision] if n_vision else [], self.keep_ratios[stage], 0.0, 1).target
        else:
            kept = n_vision if rank == n_vision else min(int(self.rank_scale * rank), n_vision - 1)
        dropped = n_vision - kept
        if not dropped or not self.recycle_ratio:
            return SparseCounts(kept, 0, 0)
        recycled = min(dropped, int(dropped * self.recycle_ratio) + 1)
        return SparseCounts(kept, recycled, min(recycled, recycled // self.tokens_per_cluster + 1))

    def vision_left(self, stage: int, n_vision: int) -> int:
        """Vision tokens of one sample behind a stage, recycled ones included.

        Raises:
            ValueError: the counts depend on the data.
        """
        if self.is_adaptive:
            raise ValueError(
                "counts: rank-adaptive counts depend on the picture; give counts or keep_ratios, or measured numbers"
            )
        counts = self.counts_at(stage, n_vision)
        return counts.kept + counts.clusters

    @classmethod
    def study_entries(cls) -> tuple[Entry, ...]:
        """One entry, with a schedule by which kept and recycled tokens together are as many as other methods keep."""

        def configs(place: Place) -> tuple[SparseVLMConfig, ...]:
            schedule = _study_schedule(len(place.layers), place.retention, place.n_vision)
            return (cls(layers=place.layers, **schedule, **place.experts),)

        return (Entry("SparseVLM", "tab:green", configs),)


def _study_schedule(stages: int, retention: float, n_vision: int | None) -> dict[str, tuple]:
    """`counts`, or `keep_ratios` where prompts differ, by which every stage leaves `retention ** (1 / stages)`."""
    share = retention ** (1 / stages)
    if n_vision is None:
        # the clusters are 3 % of what is dropped
        return {"keep_ratios": (max((share - 0.03) / 0.97, 0.01),) * stages}
    counts, n = [], n_vision
    for _ in range(stages):
        target = max(1, int(n * share))
        # the most that stay with their clusters within the target
        fitting = (kept for kept in range(target, 0, -1) if _left_of(n, kept) <= target)
        counts.append(next(fitting, 1))
        n = _left_of(n, counts[-1])
    return {"counts": tuple(counts)}


def _left_of(n_vision: int, kept: int) -> int:
    """Vision tokens behind a stage that keeps so many, recycled ones included."""
    return SparseVLMConfig(layers=(0,), counts=(kept,)).vision_left(0, n_vision)


class SparseCounts(NamedTuple):
    """What a stage does to the vision tokens of one sample: `kept` stay, `recycled` others become `clusters` tokens."""

    kept: int
    recycled: int
    clusters: int


class _SparseVLMPruning(Pruning):
    def prunes(self, stage: int, layout: VisionLayout) -> bool:
        if self.config.is_adaptive:
            return any(n > 1 for n in layout.n_vision)
        # not by how many are left: a cluster of one token stands at another place than the token did
        return any(self.config.counts_at(stage, n).kept < n for n in layout.n_vision)

    def read_prompt(self, embeddings: Callable[[], torch.Tensor], layout: VisionLayout, back: int) -> torch.Tensor:
        """The raters, bool [B, T]."""
        embedded = embeddings()
        return text_raters(embedded, layout.to(embedded.device), back)

    def look(self, call: AttentionCall) -> torch.Tensor:
        """Attention rows of the question's words, float32 [B, T, n]."""
        words = question_positions(call.layout, call.back)
        rows = attention_rows(
            call.query,
            call.key,
            words,
            scale=call.scale,
            key_mask=call.key_mask,
            visible=call.visible,
            sinks=call.sinks,
        )
        return rows[:, :, call.key.shape[2] - call.query.shape[2] :]

    def prune(self, tokens: StageInput) -> PrunedBatch:
        config, layout, raters = self.config, tokens.layout, tokens.prompt
        attention, scores = vision_scores(tokens.seen, raters, layout)
        if config.is_adaptive:
            ranks = attention_ranks(attention, raters, layout)
        else:
            ranks = (None,) * layout.batch_size
        counts = tuple(config.counts_at(tokens.stage, n, rank) for n, rank in zip(layout.n_vision, ranks, strict=True))
        return sparsify(tokens.hidden, scores, layout, counts, source=tokens.source)


def question_positions(layout: VisionLayout, back: int = 0) -> torch.Tensor:
    """Positions of the words that may rate: the text behind a sample's last vision token, as in the official code.

    (**Ours** for several images: text between them, which cannot see the later ones, does not rate.)

    Args:
        back: how many tokens at a sample's end are no part of the question; fewer than any sample's text there.

    Returns:
        int64 [B, T] on the layout's device, ending with the question's last word; -1 in front where a sample has fewer.
    """
    return last_positions(layout, tuple(tail - back for tail in layout.tails), back)


def text_raters(embeddings: torch.Tensor, layout: VisionLayout, back: int = 0) -> torch.Tensor:
    """Which words of the question rate: those more related to the picture than the mean word.

    A word's relation is the mean over the vision tokens of `softmax_text(H_v H_t^T)`, on the input embeddings.
    **Ours**: where no word exceeds the mean (there is one word only, or all are equal), all words rate.

    Args:
        embeddings: floating [B, n, H], the text model's input.
        layout, back: as in `question_positions`.

    Returns:
        bool [B, T], at the positions of `question_positions`.
    """
    positions = question_positions(layout, back)
    is_word = positions >= 0
    embeddings = embeddings.float()
    words = embeddings.gather(1, positions.clamp_min(0).unsqueeze(-1).expand(-1, -1, embeddings.shape[2]))
    likeness = (embeddings @ words.mT).masked_fill(~is_word.unsqueeze(1), float("-inf")).softmax(-1)  # [B, n, T]
    vision = layout.vision_mask.unsqueeze(-1)
    relation = torch.where(vision, likeness, 0.0).sum(1) / vision.sum(1).clamp_min(1)  # [B, T], 0 at no word
    mean = relation.sum(1, keepdim=True) / is_word.sum(1, keepdim=True)
    raters = is_word & (relation > mean)
    return torch.where(raters.any(1, keepdim=True), raters, is_word)


def vision_scores(rows: torch.Tensor, raters: torch.Tensor, layout: VisionLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The raters' attention to the vision tokens, and its mean over raters.

    Args:
        rows: float32 [B, T, n], attention rows of the question's words (see `attention_rows`).
        raters: bool [B, T].
        layout: of the n tokens.

    Returns:
        (float32 [B, T, n], 0 outside raters and vision tokens; float32 [B, n], the scores).
    """
    attention = torch.where(raters.unsqueeze(-1) & layout.vision_mask.unsqueeze(1), rows, 0.0)
    return attention, attention.sum(1) / raters.sum(1, keepdim=True)


def attention_ranks(attention: torch.Tensor, raters: torch.Tensor, layout: VisionLayout) -> tuple[int, ...]:
    """Rank of each sample's rater x vision matrix. Reads the device: the one host read of rank-adaptive pruning.

    Singular values count above `max(raters, vision tokens) * 2**-23` of the largest, torch's tolerance for float32.
    A sample whose attention is not finite has full rank, so that it keeps all tokens.

    Args:
        attention, raters: from `vision_scores`; zeros around a sample's own matrix do not change its rank.
    """
    sizes = layout.device_table((layout.n_vision,))[0]
    tolerance = torch.finfo(torch.float32).eps * torch.maximum(raters.sum(1), sizes)
    finite = attention.isfinite().all(-1).all(-1)
    ranks = torch.linalg.matrix_rank(torch.where(finite[:, None, None], attention, 0.0), rtol=tolerance)
    return tuple(torch.where(finite, ranks, sizes).tolist())


def density_peaks(
    tokens: torch.Tensor, sizes: torch.Tensor, clusters: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster some tokens around their density peaks (DPC-kNN: Du et al. 2016, after Rodriguez and Laio 2014).

    With d the Euclidean distance over sqrt(H), a token's density is `exp(-mean of d^2 to its k nearest)`, itself among
    them and k the number of clusters, as in SparseVLM's code; its separation is the distance to the nearest token of
    higher density (for the densest, the largest distance of all). The tokens with the largest product of the two are
    the centres, every other token belongs to the nearest centre. **Ours**: all ties go to the earlier token.

    Args:
        tokens: floating [B, m, H].
        sizes, clusters: int [B, 1], tokens of each sample (the rest of its m is padding) and its number of clusters.

    Returns:
        (int64 [B, m], each token's centre; bool [B, m], true at centres). At padding they are false and meaningless.
    """
    number = torch.arange(tokens.shape[1], device=tokens.device)
    valid = number < sizes  # [B, m]
    pairs = valid.unsqueeze(1) & valid.unsqueeze(2)
    # by subtraction: products of large vectors would cancel
    distance = torch.cdist(tokens.float(), tokens.float(), compute_mode="donot_use_mm_for_euclid_dist")
    distance = (distance / tokens.shape[2] ** 0.5).masked_fill(~pairs, float("inf"))

    nearest = distance.sort(-1).values.square()
    density = torch.exp(-torch.where(number < clusters.unsqueeze(-1), nearest, 0.0).sum(-1) / clusters.clamp_min(1))
    density = density.masked_fill(~valid, -1.0)
    mine, other = density.unsqueeze(2), density.unsqueeze(1)
    is_denser = (other > mine) | ((other == mine) & (number < number.unsqueeze(1)))
    separation = distance.masked_fill(~is_denser, float("inf")).amin(-1)
    largest = distance.masked_fill(~pairs, 0.0).amax((1, 2)).unsqueeze(-1)
    separation = torch.where(separation.isinf(), largest, separation)

    order = (density * separation).masked_fill(~valid, -1.0).sort(dim=1, descending=True, stable=True).indices
    is_centre = torch.zeros_like(valid).scatter_(1, order, number < clusters)
    centre = distance.masked_fill(~is_centre.unsqueeze(1), float("inf")).argmin(-1)
    return torch.where(is_centre, number, centre), is_centre


def sparsify(
    hidden: torch.Tensor,
    scores: torch.Tensor,
    layout: VisionLayout,
    counts: tuple[SparseCounts, ...],
    *,
    source: torch.Tensor | None = None,
) -> PrunedBatch:
    """Shorten a batch: keep the best vision tokens and all text, and recycle the best of the rest.

    A sample's recycled tokens stand behind its kept vision tokens, in front of the text behind the last of them.
    **Ours**: they come in the order of their centres, whose positions they keep. No host read: all shapes follow
    from `counts`. Ties go to the earlier token.

    Args:
        hidden: floating [B, n, H].
        scores: float32 [B, n], read at vision tokens.
        layout: where they are.
        counts: one per sample.
        source: as in `prune_batch`.

    Returns:
        As `prune_batch` does, a cluster in the place of a merged window and its centre in that of the window's first
        token. Between layers there is one stream: `hidden` and `residual` are the same tensor.
    """
    n = hidden.shape[1]
    lengths = tuple(
        length - n_vision + kept + clusters
        for length, n_vision, (kept, _, clusters) in zip(layout.lengths, layout.n_vision, counts, strict=True)
    )
    width = max(lengths)
    new_start = tuple(width - length if layout.padding_side == "left" else 0 for length in lengths)
    first_cluster = tuple(
        start + length - tail - clusters
        for start, length, tail, (_, _, clusters) in zip(new_start, lengths, layout.tails, counts, strict=True)
    )
    tail_start = tuple(
        start + length - tail for start, length, tail in zip(layout.starts, layout.lengths, layout.tails, strict=True)
    )
    table = layout.device_table((*zip(*counts, strict=True), lengths, new_start, first_cluster, tail_start))
    kept, recycled, clusters, length, new_start, first_cluster, tail_start = table.long().unsqueeze(-1)  # [B, 1] each

    # who stays, and what comes of the best of the others
    position = torch.arange(n, device=hidden.device)
    vision = layout.vision_mask
    order = torch.where(vision, scores, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    is_kept = torch.zeros_like(vision).scatter_(1, order, position < kept)
    candidates = order.gather(1, (kept + position[: max(c.recycled for c in counts)]).clamp_max(n - 1))
    centres, means = _recycle(hidden, candidates, recycled, clusters, max(c.clusters for c in counts))
    scratch = torch.zeros(hidden.shape[0], n + 1, dtype=torch.bool, device=hidden.device)
    is_centre = scratch.scatter_(1, centres, True)[:, :n]

    # the new order: what stands in front, the clusters, the text behind; then everything that goes
    stays = is_kept | (layout.valid_mask & ~vision)
    turn = torch.where(is_centre, 1, torch.where(~stays, 3, torch.where(position < tail_start, 0, 2)))
    survivors = (turn * n + position).argsort(1)
    column = torch.arange(width, device=hidden.device)
    slot = column - new_start
    is_token = (slot >= 0) & (slot < length)  # [B, n']
    index = torch.where(is_token, survivors.gather(1, slot.clamp(0, n - 1)), -1)
    old = index.clamp_min(0)

    def shorten(x: torch.Tensor) -> torch.Tensor:
        return torch.where(is_token.unsqueeze(-1), _rows(x, old), 0)

    short = shorten(hidden)
    if means.shape[1]:
        number = position[: means.shape[1]]
        slots = torch.where(number < clusters, first_cluster + number, width).unsqueeze(-1).expand_as(means)
        # one more row, for what is no cluster of its sample
        short = torch.cat((short, means[:, :1]), 1).scatter_(1, slots, means)[:, :width].contiguous()

    new_vision = is_token & vision.gather(1, old)
    last_other = torch.where(new_vision, -1, column).cummax(1).values
    run_rank = torch.where(new_vision, column - last_other - 1, -1).to(torch.int32)
    return PrunedBatch(
        hidden=short,
        residual=short,
        index=index if source is None else torch.where(is_token, source.gather(1, old), -1),
        merged=is_token & is_centre.gather(1, old),
        layout=replace(
            layout,
            width=width,
            lengths=lengths,
            n_vision=tuple(count.kept + count.clusters for count in counts),
            run_rank=run_rank,
        ),
        valid=is_token,
    )


def _recycle(
    hidden: torch.Tensor,
    candidates: torch.Tensor,  # [B, m] positions of the tokens to recycle, best first
    recycled: torch.Tensor,  # [B, 1] how many of them are a sample's own
    clusters: torch.Tensor,  # [B, 1]
    most_clusters: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions [B, C] of the clusters' centres in order, n where a sample has fewer; their means [B, C, H])."""
    if not most_clusters:
        return candidates.new_empty(hidden.shape[0], 0), hidden.new_empty(hidden.shape[0], 0, hidden.shape[2])
    is_own = torch.arange(candidates.shape[1], device=hidden.device) < recycled
    # padding may hold anything, and 0 times NaN is NaN
    tokens = torch.where(is_own.unsqueeze(-1), _rows(hidden, candidates), 0).float()
    centre, is_centre = density_peaks(tokens, recycled, clusters)
    positions, centres = torch.where(is_centre, candidates, hidden.shape[1]).sort(dim=1, stable=True)
    is_member = (centre.unsqueeze(1) == centres[:, :most_clusters].unsqueeze(-1)) & is_own.unsqueeze(1)  # [B, C, m]
    weight = is_member.float() / is_member.sum(-1, keepdim=True).clamp_min(1)
    return positions[:, :most_clusters], (weight @ tokens).to(hidden.dtype)


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [B, n, H] at index [B, m] -> [B, m, H]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))
