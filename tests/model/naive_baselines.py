"""The baselines, once more: one sample, one token, one head at a time, from the definitions in the papers.

As in naive.py a sequence is a plain list of tokens. What a layer's attention looks like is known in full here: a map of
which `map[i][j]` is the attention of token i to token j <= i, averaged over heads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import naive
from .naive import Margins, Token, best

Map = list[list[float]]


# FastV


def fastv_kept(
    vision: Sequence[bool], attention: Map, retention: float, query: str, margins: Margins | None = None
) -> list[int]:
    """Indices of the vision tokens that stay."""
    indices = [i for i, is_vision in enumerate(vision) if is_vision]
    rows = attention if query == "mean" else attention[-1:]
    scores = [sum(row[i] for row in rows if i < len(row)) / len(rows) for i in indices]
    chosen, gap = best(scores, max(1, round(len(indices) * retention)))
    if margins:
        margins.note("tokens", gap / max(scores))
    return sorted(indices[i] for i in chosen)


# SparseVLM


def question(vision: Sequence[bool]) -> list[int]:
    """Indices of the words behind the last vision token."""
    last = max(i for i, is_vision in enumerate(vision) if is_vision)
    return list(range(last + 1, len(vision)))


def text_raters(embeddings: Sequence[Tensor], vision: Sequence[bool], margins: Margins | None = None) -> list[int]:
    """Indices of the words that rate."""
    words = question(vision)
    relation = [0.0 for _ in words]
    pictures = [i for i, is_vision in enumerate(vision) if is_vision]
    for i in pictures:
        logits = [float(embeddings[i] @ embeddings[word]) for word in words]
        weights = [math.exp(logit - max(logits)) for logit in logits]
        for w, weight in enumerate(weights):
            relation[w] += weight / sum(weights) / len(pictures)
    mean = sum(relation) / len(relation)
    if margins and len(words) > 1:
        margins.note("tokens", min(abs(r - mean) for r in relation))
    return [word for word, r in zip(words, relation, strict=True) if r > mean] or words


def rank_of(matrix: Tensor) -> int:
    """Singular values above float32's tolerance."""
    values = torch.linalg.svdvals(matrix.double())
    return int((values > max(matrix.shape) * 2**-23 * values.max()).sum())


@dataclass(frozen=True)
class Cluster:
    """Some of a list of tokens, by their numbers; the centre is a member."""

    centre: int
    members: tuple[int, ...]


def density_peaks(tokens: Sequence[Tensor], clusters: int, margins: Margins | None = None) -> list[Cluster]:
    """DPC-kNN, by falling density times separation."""
    numbers = range(len(tokens))
    distance = [[float((a - b).norm()) / math.sqrt(len(a)) for b in tokens] for a in tokens]
    density = [math.exp(-sum(d * d for d in sorted(distance[i])[:clusters]) / clusters) for i in numbers]
    separation = []
    for i in numbers:
        denser = [j for j in numbers if density[j] > density[i] or (density[j] == density[i] and j < i)]
        largest = max(max(row) for row in distance)
        separation.append(min(distance[i][j] for j in denser) if denser else largest)
    centres, gap = best([density[i] * separation[i] for i in numbers], clusters)
    if margins:
        # with one cluster all densities are 1 and the first token is the centre, whatever the distances
        margins.note("windows", gap if clusters > 1 else math.inf)
        order = sorted(density)
        if clusters > 1:
            # of two clusters, each other's nearest tokens are equally dense in any precision
            gaps = [b - a for a, b in itertools.pairwise(order) if b != a]
            margins.note("windows", min(gaps, default=math.inf))
    members: dict[int, list[int]] = {centre: [] for centre in centres}
    for i in numbers:
        near = sorted(centres, key=lambda centre: (distance[i][centre], centre))
        if i not in centres and margins and len(near) > 1:
            margins.note("windows", distance[i][near[1]] - distance[i][near[0]])
        members[i if i in centres else near[0]].append(i)
    return [Cluster(centre, tuple(members[centre])) for centre in centres]


@dataclass(frozen=True)
class Sparse:
    """What a SparseVLM stage does to one sample; indices into its tokens."""

    kept: list[int]
    clusters: list[Cluster]  # in the order of their centres


def sparse_stage(
    hidden: Sequence[Tensor],
    vision: Sequence[bool],
    attention: Map,
    raters: Sequence[int],
    keep: int | None = None,
    rank_scale: float = 13.5,
    recycle_ratio: float = 0.3,
    tokens_per_cluster: int = 10,
    margins: Margins | None = None,
) -> Sparse:
    """One stage; without `keep` the rank decides."""
    indices = [i for i, is_vision in enumerate(vision) if is_vision]
    rows = [[attention[rater][i] for i in indices] for rater in raters]
    scores = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    if keep is None:
        rank = rank_of(torch.tensor(rows, dtype=torch.float64))
        keep = len(indices) if rank == len(indices) else min(int(rank * rank_scale), len(indices) - 1)
    if keep >= len(indices):
        return Sparse(indices, [])
    order, _ = best(scores, len(indices))
    if margins:
        margins.note("tokens", (scores[order[keep - 1]] - scores[order[keep]]) / max(scores))
    dropped = [indices[i] for i in order[keep:]]
    clusters = []
    if recycle_ratio:
        again = dropped[: int(len(dropped) * recycle_ratio) + 1]
        if margins and len(again) < len(dropped):
            here = keep + len(again)
            margins.note("tokens", (scores[order[here - 1]] - scores[order[here]]) / max(scores))
        count = min(len(again), len(again) // tokens_per_cluster + 1)
        found = density_peaks([hidden[i] for i in again], count, margins)
        clusters = [Cluster(again[c.centre], tuple(sorted(again[i] for i in c.members))) for c in found]
    return Sparse(sorted(indices[i] for i in order[:keep]), sorted(clusters, key=lambda cluster: cluster.centre))


def shortened(tokens: Sequence[Token], stage: Sparse) -> list[Token]:
    """The tokens behind a stage: recycled ones in front of the question, at their centres' positions."""
    vision = [token.vision for token in tokens]
    front = [token for i, token in enumerate(tokens[: question(vision)[0]]) if not token.vision or i in stage.kept]
    recycled = [
        replace(tokens[c.centre], hidden=sum(tokens[i].hidden for i in c.members) / len(c.members))
        for c in stage.clusters
    ]
    return [*front, *recycled, *(tokens[i] for i in question(vision))]


# blind


def uniform_kept(vision: Sequence[bool], target: int) -> list[int]:
    """Indices of vision tokens at equal distances."""
    indices = [i for i, is_vision in enumerate(vision) if is_vision]
    return [indices[k * len(indices) // target] for k in range(target)]


# whole models


@dataclass(frozen=True)
class Pruning:
    """How a baseline prunes: at which layers, and a sample's tokens there -> those that stay.

    `prune(sample, stage, tokens)` may look at `sample.map` and `sample.embeddings`.
    """

    layers: tuple[int, ...]
    prune: Callable[[Sample, int, list[Token]], list[Token]]
    in_front_of_moe: bool = False
    experts: naive.Settings = field(default_factory=naive.Settings)


def only(kept: Callable[[Sample, int, list[bool]], list[int]]) -> Callable[[Sample, int, list[Token]], list[Token]]:
    """A `prune` from which vision tokens to keep."""

    def prune(sample: Sample, stage: int, tokens: list[Token]) -> list[Token]:
        stay = kept(sample, stage, [token.vision for token in tokens])
        return [token for i, token in enumerate(tokens) if not token.vision or i in stay]

    return prune


def fastv(layer: int, retention: float, query: str = "last", **experts) -> Pruning:
    def kept(sample: Sample, stage: int, vision: list[bool]) -> list[int]:
        return fastv_kept(vision, sample.map, retention, query, sample.margins)

    return Pruning((layer - 1,), only(kept), experts=naive.Settings(**experts))


def sparsevlm(
    layers: tuple[int, ...], counts: tuple[int, ...] | None = None, options: dict | None = None, **experts
) -> Pruning:
    def prune(sample: Sample, stage: int, tokens: list[Token]) -> list[Token]:
        vision = [token.vision for token in tokens]
        # the question's words keep their distance from the end
        shift = len(tokens) - len(sample.embeddings)
        raters = [i + shift for i in text_raters(sample.embeddings, sample.vision, sample.margins)]
        keep = None if counts is None else counts[stage]
        hidden = [token.hidden for token in tokens]
        done = sparse_stage(hidden, vision, sample.map, raters, keep, margins=sample.margins, **(options or {}))
        return shortened(tokens, done)

    return Pruning(layers, prune, experts=naive.Settings(**experts))


def blind(
    layers: tuple[int, ...],
    keep_ratios: tuple[float, ...],
    kept: Callable[[int, list[bool], int], list[int]],
    **experts,
) -> Pruning:
    """`kept(layer, vision, target)` chooses."""

    def choose(sample: Sample, stage: int, vision: list[bool]) -> list[int]:
        n = sum(vision)
        target = n if n <= 1 else max(1, int(n * keep_ratios[stage]))
        return kept(layers[stage], vision, target)

    return Pruning(layers, only(choose), in_front_of_moe=True, experts=naive.Settings(**experts))


class Sample(naive.Sample):
    """One prompt under a baseline."""

    def __init__(self, weights, text_config, pruning: Pruning, embeddings: Tensor, vision: Sequence[bool]):
        self.pruning, self.embeddings, self.vision = pruning, list(embeddings), list(vision)
        self.map: Map = []
        super().__init__(weights, text_config, pruning.experts, embeddings, vision)

    def attention(self, layer: int, tokens: list[Token]) -> tuple[list[Token], list[float]]:
        after, self.map = [], []
        for token in tokens:
            (moved,), row = super().attention(layer, [token])
            after.append(moved)
            self.map.append(row)
        return after, self.map[-1]

    def prune(self, layer: int, tokens: list[Token]) -> list[Token]:
        after = tokens
        if any(token.vision for token in tokens):
            after = self.pruning.prune(self, self.pruning.layers.index(layer), tokens)
        made = [all(token is not before for before in tokens) for token in after]

        def vision(survivors: Sequence[Token]) -> tuple[int, ...]:
            return tuple(token.position for token in survivors if token.vision)

        self.stages.append(
            naive.Stage(
                layer,
                entering=vision(tokens),
                windows=(),
                merged=tuple((token.position,) for token, new in zip(after, made, strict=True) if new),
                kept=vision([token for token, new in zip(after, made, strict=True) if not new]),
                survivors=tuple(token.position for token in after),
                merged_flags=tuple(made),
            )
        )
        return after

    def layers(self, tokens: list[Token], prefill: bool) -> list[Token]:
        for layer in range(self.text.num_hidden_layers):
            prunes = prefill and layer in self.pruning.layers
            tokens, _ = self.attention(layer, tokens)
            if prunes and self.pruning.in_front_of_moe:
                tokens = self.prune(layer, tokens)
            if prefill:
                self.tokens_per_layer.append(len(tokens))
            weight = self.weight(layer, "post_attention_layernorm.weight")
            tokens = [
                replace(t, hidden=t.hidden + self.mlp(layer, self.norm(t.hidden, weight), t.vision)) for t in tokens
            ]
            if prunes and not self.pruning.in_front_of_moe:
                tokens = self.prune(layer, tokens)
        return tokens


@torch.no_grad()
def samples(model, inputs: dict[str, Tensor], pruning: Pruning, dtype: torch.dtype = torch.float64) -> list[Sample]:
    """One prefilled sample per row of a padded batch, padding taken off; for `naive.greedy(..., samples=samples)`."""
    weights = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
    features = iter(())
    if inputs.get("pixel_values") is not None:
        features = iter(model.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1).to(dtype))
    table = weights["model.language_model.embed_tokens.weight"]
    rows = []
    for ids, valid in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        ids = ids[valid].tolist()
        vision = [token == model.config.image_token_id for token in ids]
        embeddings = torch.stack([next(features) if v else table[i] for i, v in zip(ids, vision, strict=True)])
        rows.append(Sample(weights, model.config.text_config, pruning, embeddings, vision))
    assert next(features, None) is None
    return rows
