"""The baselines' configs, math and FLOPs against the definitions in naive_baselines.py and figures by hand."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmmoe
from fastmmoe.methods import FastVConfig, RandomConfig, SparseVLMConfig, UniformConfig
from fastmmoe.methods.attention_rows import attention_rows, last_positions
from fastmmoe.methods.fastv import received_attention
from fastmmoe.methods.random import random_importance
from fastmmoe.methods.sparsevlm import (
    SparseCounts,
    attention_ranks,
    density_peaks,
    question_positions,
    sparsify,
    text_raters,
    vision_scores,
)
from fastmmoe.methods.uniform import uniform_importance
from fastmmoe_kernels import VisionLayout, last_query_attention, prune_tokens

from . import naive, naive_baselines
from .naive import Token
from .tiny import tiny_batch, tiny_internvl

CLOSE = dict(atol=1e-5, rtol=1e-4)
INTERNVL = "internvl3.5-30b-a3b"


@dataclasses.dataclass
class Samples:
    """A padded batch; padding holds NaN. `vision[b]` are the flags of sample b without its padding."""

    vision: list[list[bool]]
    layout: VisionLayout

    def pad(self, rows: list[torch.Tensor], fill: float = math.nan) -> torch.Tensor:
        """[length, ...] per sample -> [B, n, ...]."""
        out = torch.full((len(rows), self.layout.width, *rows[0].shape[1:]), fill, dtype=rows[0].dtype)
        for b, row in enumerate(rows):
            out[b, self.own(b)] = row
        return out

    def own(self, b: int) -> slice:
        return slice(self.layout.starts[b], self.layout.starts[b] + self.layout.lengths[b])


# runs of vision tokens between text: (first text, run, text, run, ..., last text)
SHAPES = [[3, 7, 2, 5, 4], [1, 30, 6], [0, 4, 3], [2, 1, 5]]


def padded(shapes=SHAPES, side="left") -> Samples:
    vision = [[bool(i % 2) for i, count in enumerate(shape) for _ in range(count)] for shape in shapes]
    width = max(map(len, vision))
    masks = torch.zeros(2, len(vision), width, dtype=torch.bool)
    for b, flags in enumerate(vision):
        place = slice(width - len(flags), None) if side == "left" else slice(len(flags))
        masks[0, b, place], masks[1, b, place] = torch.tensor(flags), True
    return Samples(vision, VisionLayout.from_mask(*masks))


def draws(samples: Samples, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    """Per sample float64 [length, *shape], values that float32 can hold."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(flags), *shape, generator=generator).double() for flags in samples.vision]


sides = pytest.mark.parametrize("side", ["left", "right"])


# configs


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FastVConfig(layer=0), ValueError, "layer: expected an int >= 1, got 0"),
        (lambda: FastVConfig(layer=2.0), TypeError, "layer: expected an int >= 1"),
        (lambda: FastVConfig(retention=0.0), ValueError, r"retention: expected a number in \(0, 1\]"),
        (lambda: FastVConfig(query="first"), ValueError, "query: expected one of last, mean, got 'first'"),
        (lambda: FastVConfig(vision_top_k=0), ValueError, "vision_top_k: expected an int >= 1"),
        (lambda: FastVConfig(backend="cuda"), ValueError, "backend: expected one of auto"),
        (lambda: RandomConfig((1, 2), 0.5, seed=-1), ValueError, "seed: expected an int >= 0, got -1"),
        (lambda: RandomConfig((2, 1), 0.5), ValueError, "prune_layers: expected layers in rising order"),
        (lambda: RandomConfig(retention=0.5), ValueError, r"retention=0.5 with prune_layers=\(\)"),
        (lambda: UniformConfig((1,), 0.5, (0.5,)), ValueError, "expected one of the two, got both"),
        (lambda: UniformConfig((1,), keep_ratios=(0.5, 0.5)), ValueError, "expected one ratio for each"),
        (lambda: SparseVLMConfig(layers=()), ValueError, r"layers=\(\)"),
        (lambda: SparseVLMConfig(layers=(6, 2)), ValueError, "layers: expected layers in rising order"),
        (lambda: SparseVLMConfig(counts=(1, 2)), ValueError, r"counts=\(1, 2\): expected one for each of layers"),
        (lambda: SparseVLMConfig((2,), counts=(0,)), ValueError, r"counts\[0\]: expected an int >= 1"),
        (lambda: SparseVLMConfig((2,), (9,), (0.5,)), ValueError, "expected one of the two"),
        (lambda: SparseVLMConfig(rank_scale=0.5), ValueError, "rank_scale: expected a finite number >= 1.0"),
        (lambda: SparseVLMConfig(rank_scale=math.inf), ValueError, "rank_scale: expected a finite number >= 1.0"),
        (lambda: SparseVLMConfig(rank_scale=math.nan), ValueError, "rank_scale: expected a finite number >= 1.0"),
        (lambda: SparseVLMConfig(recycle_ratio=1.1), ValueError, r"recycle_ratio: expected a number in \[0, 1\]"),
        (lambda: SparseVLMConfig(tokens_per_cluster=0), ValueError, "tokens_per_cluster: expected an int >= 1"),
    ],
)
def test_bad_config(make, error, message):
    with pytest.raises(error, match=message):
        make()


CONFIGS = [
    FastVConfig(3, 0.25, query="mean", vision_top_k=4),
    RandomConfig([1, 4], 0.5, seed=7, min_vision_tokens=9),
    UniformConfig(prune_layers=(1, 4), keep_ratios=[0.5, 1], backend="torch"),
    SparseVLMConfig(vision_top_k=2, reduction_layer=0),
    SparseVLMConfig([2, 6], counts=[300, 110]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_config_is_frozen_and_survives_json(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vision_top_k = 1
    assert hash(config) == hash(dataclasses.replace(config))
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="values: unknown fields \\['alpha'\\]"):
        type(config).from_dict({"alpha": 0.5})


def test_where_each_prunes():
    assert FastVConfig(layer=2).prune_layers == (1,) and FastVConfig.prunes_behind_layer
    assert SparseVLMConfig().prune_layers == (2, 6, 15, 19) and SparseVLMConfig.prunes_behind_layer
    assert RandomConfig((5, 8), 0.5).prune_layers == (5, 8) and not RandomConfig.prunes_behind_layer
    assert not UniformConfig.prunes_behind_layer and not fastmmoe.FastMMoEConfig.prunes_behind_layer


@pytest.mark.parametrize(
    ("config", "layers", "message"),
    [
        (FastVConfig(layer=6), 6, "layer=6: the model has 6 layers, expected a layer from 1 to 5"),
        (SparseVLMConfig((2, 5)), 6, r"layers=\(2, 5\): the model has 6 layers, expected layers from 0 to 4"),
        (RandomConfig((6,), 0.5), 6, r"prune_layers=\(6,\): the model has 6 layers"),
        (FastVConfig(layer=5, vision_top_k=9), 6, "vision_top_k=9: expected at most the model's 8"),
        (SparseVLMConfig((2,), vision_top_k=4, reduction_layer=6), 6, "reduction_layer=6"),
    ],
)
def test_a_config_that_does_not_fit_the_model(config, layers, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        config.check_model(layers, 8)
    config = dataclasses.replace(config, vision_top_k=None)
    config.check_model(layers + 1, 8)


def test_counts_by_hand():
    assert [FastVConfig(retention=r).vision_left(0, 576) for r in (0.5, 0.25, 1.0)] == [288, 144, 576]
    # halves to even, as Python rounds; one token at least
    assert [FastVConfig(retention=0.5).vision_left(0, n) for n in (0, 1, 3, 5, 7)] == [0, 1, 2, 2, 4]
    same = fastmmoe.FastMMoEConfig(prune_layers=(1, 2), retention=0.5, merge_ratio=0.0)
    for config in (RandomConfig((1, 2), 0.5), UniformConfig((1, 2), 0.5), same):
        assert [config.vision_left(0, n) for n in (0, 1, 2, 10, 1792)] == [0, 1, 1, 7, 1267]


def test_sparse_counts_by_hand():
    # 276 of 576 go; int(82.8) + 1 = 83 come back in int(8.3) + 1 = 9 clusters
    fixed = SparseVLMConfig(counts=(300, 200, 110, 110))
    assert fixed.counts_at(0, 576) == (300, 83, 9) and fixed.vision_left(0, 576) == 309
    assert fixed.counts_at(1, 309) == (200, 33, 4)
    # fewer than the schedule keeps: nothing happens
    assert fixed.counts_at(0, 300) == (300, 0, 0) and fixed.counts_at(0, 0) == (0, 0, 0)
    assert fixed.counts_at(0, 301) == (300, 1, 1)
    shares = SparseVLMConfig((2,), keep_ratios=(0.5,), recycle_ratio=0.0)
    assert [shares.counts_at(0, n) for n in (0, 1, 9)] == [(0, 0, 0), (1, 0, 0), (4, 0, 0)]
    by_rank = SparseVLMConfig()
    assert by_rank.counts_at(0, 576, rank=20) == (270, 92, 10)  # int(91.8) + 1, int(9.2) + 1
    assert by_rank.counts_at(0, 100, rank=20) == (99, 1, 1)
    assert by_rank.counts_at(0, 20, rank=20) == (20, 0, 0)
    assert by_rank.counts_at(0, 0, rank=0) == (0, 0, 0)
    every = SparseVLMConfig((2,), counts=(1,), recycle_ratio=1.0, tokens_per_cluster=1)
    assert every.counts_at(0, 5) == (1, 4, 4)
    with pytest.raises(ValueError, match="rank-adaptive counts depend on the picture"):
        by_rank.vision_left(0, 576)


# attention rows


def maps(samples: Samples, heads=4, kv_heads=2, dim=8, seed=0):
    """Padded query and key of every token, and each sample's attention map, one row of one head at a time."""
    query, key = draws(samples, heads, dim, seed=seed), draws(samples, kv_heads, dim, seed=seed + 1)
    attention = []
    for q, k in zip(query, key, strict=True):
        rows = []
        for i in range(len(q)):
            by_head = [
                torch.softmax(k[: i + 1, head // (heads // kv_heads)] @ q[i, head] * 0.3, 0) for head in range(heads)
            ]
            rows.append((sum(by_head) / heads).tolist())
        attention.append(rows)
    padded_query, padded_key = (samples.pad(x).float().transpose(1, 2) for x in (query, key))
    return padded_query, padded_key, attention


@sides
def test_attention_rows(side):
    samples = padded(side=side)
    query, key, attention = maps(samples)
    positions = last_positions(samples.layout, (3, 1, 7, 2))
    rows = attention_rows(query, key, positions, scale=0.3, key_mask=samples.layout.valid_mask)
    assert rows.shape == (4, 7, samples.layout.width) and rows.dtype == torch.float32
    for b, count in enumerate((3, 1, 7, 2)):
        assert (positions[b, : 7 - count] == -1).all() and (rows[b, : 7 - count] == 0).all()
        for row, want in zip(rows[b, 7 - count :], attention[b][-count:], strict=True):
            own = row[samples.own(b)]
            torch.testing.assert_close(own[: len(want)].double(), torch.tensor(want).double(), **CLOSE)
            assert (own[len(want) :] == 0).all()
            assert torch.isclose(row.sum(), torch.tensor(1.0))


def test_attention_rows_on_a_cache_are_the_last_query_attention():
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 12, 8)
    positions = torch.tensor([[1, 4], [0, 4]])
    rows = attention_rows(query, key, positions, scale=0.3)
    want = last_query_attention(query[:, :, 4], key, scale=0.3)
    torch.testing.assert_close(rows[:, 1], want, **CLOSE)
    want = last_query_attention(query[:1, :, 1], key[:1, :, : 7 + 2], scale=0.3)  # 7 cached, then 0 and 1
    torch.testing.assert_close(rows[:1, 0, :9], want, **CLOSE)
    assert (rows[0, 0, 9:] == 0).all()


@sides
@pytest.mark.parametrize("back", [0, 2])
def test_last_positions(side, back):
    samples = padded(side=side)
    positions = last_positions(samples.layout, (2, 5, 1, 3), back)
    for b, count in enumerate((2, 5, 1, 3)):
        end = samples.own(b).stop - back
        assert positions[b].tolist() == [-1] * (5 - count) + list(range(end - count, end))


# FastV


@sides
@pytest.mark.parametrize("back", [0, 2])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_received_attention(side, chunk, back):
    samples = padded(side=side)
    query, key, attention = maps(samples)
    mask = samples.layout.valid_mask
    got = received_attention(query, key, samples.layout, scale=0.3, key_mask=mask, back=back, chunk=chunk)
    for b, rows in enumerate(attention):
        rows = rows[: len(rows) - back]
        want = [sum(row[i] for row in rows if i < len(row)) / len(rows) for i in range(len(rows) + back)]
        torch.testing.assert_close(got[b, samples.own(b)].double(), torch.tensor(want).double(), **CLOSE)
    assert (got[~mask] == 0).all()


@pytest.mark.parametrize("query", ["last", "mean"])
def test_fastv_keeps_what_the_definition_keeps(query):
    samples = padded()
    q, k, attention = maps(samples)
    mask = samples.layout.valid_mask
    if query == "mean":
        scores = received_attention(q, k, samples.layout, scale=0.3, key_mask=mask)
    else:
        scores = last_query_attention(q[:, :, -1], k, scale=0.3, key_mask=mask)
    config = FastVConfig(2, 0.4, query)
    for b, flags in enumerate(samples.vision):
        indices = [i for i, is_vision in enumerate(flags) if is_vision]
        own = scores[b, samples.own(b)][indices]
        kept = own.topk(config.vision_left(0, len(indices))).indices.tolist()
        want = naive_baselines.fastv_kept(flags, attention[b], 0.4, query)
        assert sorted(indices[i] for i in kept) == want


def test_fastv_mean_is_not_last():
    samples = padded()
    _, _, attention = maps(samples)
    last, mean = (
        [naive_baselines.fastv_kept(flags, rows, 0.4, q) for flags, rows in zip(samples.vision, attention, strict=True)]
        for q in ("last", "mean")
    )
    assert last != mean


# random and uniform


def kept_by(importance: torch.Tensor, samples: Samples, ratio: float) -> list[list[int]]:
    """What a prune stage keeps by an importance alone: indices in each sample, text included."""
    b, n = importance.shape
    hidden = torch.zeros(b, n, 1)
    out = prune_tokens(
        hidden,
        hidden,
        torch.zeros(b, n, 1),
        importance,
        samples.layout,
        keep_ratio=ratio,
        merge_ratio=0.0,
        window=1,
        alpha=0.0,
        strategy="dynamic_attention",
        merge_method="mean",
    )
    starts = samples.layout.starts
    return [[i - starts[s] for i in row.tolist() if i >= 0] for s, row in enumerate(out.index)]


@sides
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.77, 1.0])
def test_uniform(side, ratio):
    samples = padded(side=side)
    config = UniformConfig((1,), ratio)
    kept = kept_by(config.importance(0, samples.layout), samples, ratio)
    for flags, got in zip(samples.vision, kept, strict=True):
        target = config.vision_left(0, sum(flags))
        want = naive_baselines.uniform_kept(flags, target)
        assert [i for i in got if flags[i]] == want and len(want) == target
        assert [i for i in got if not flags[i]] == [i for i, is_vision in enumerate(flags) if not is_vision]


@given(st.integers(1, 300), st.data())
def test_uniform_distances_differ_by_one_at_most(n, data):
    target = data.draw(st.integers(1, n))
    layout = VisionLayout.from_mask(torch.ones(1, n, dtype=torch.bool))
    kept = uniform_importance(layout, (target,))[0].nonzero()[:, 0]
    assert len(kept) == target and kept[0] == 0
    if target > 1:
        gaps = {*kept.diff().tolist(), n - int(kept[-1])}
        assert max(gaps) - min(gaps) <= 1


@sides
def test_random_is_a_permutation_that_depends_on_seed_and_layer_alone(side):
    samples = padded([[2, 9, 3], [5, 4, 1, 5, 2], [1, 6, 1]], side)
    importance = random_importance(samples.layout, seed=3, layer=5)
    orders = [importance[b][samples.layout.vision_mask[b]].tolist() for b in range(3)]
    assert [sorted(order) for order in orders] == [list(range(n)) for n in (9, 9, 6)]
    assert orders[0] == orders[1]  # the runs do not matter
    alone = padded([[1, 6, 1]])
    assert random_importance(alone.layout, 3, 5)[alone.layout.vision_mask].tolist() == orders[2]
    assert (importance[~samples.layout.vision_mask] == 0).all()
    others = [random_importance(samples.layout, *key) for key in [(3, 6), (4, 5)]]
    assert not any(torch.equal(importance, other) for other in others)


@pytest.mark.parametrize("seed", [2**62, 2**63, 2**64 - 1, 2**64, 10**30])
def test_a_seed_of_any_size(seed):
    layout = padded([[2, 9, 3]]).layout
    order = random_importance(layout, seed, 40)
    assert sorted(order[layout.vision_mask].tolist()) == list(range(9))
    assert not torch.equal(order, random_importance(layout, seed + 1, 40))


def test_random_keeps_every_token_equally_often():
    layout = VisionLayout.from_mask(torch.ones(1, 10, dtype=torch.bool))
    draws_of = [random_importance(layout, seed, layer)[0] for seed in range(500) for layer in (1, 2)]
    often = torch.stack([order >= 6 for order in draws_of]).float().mean(0)  # the best 4 of 10
    assert (often - 0.4).abs().max() < 4 * (0.4 * 0.6 / 1000) ** 0.5


# SparseVLM


@sides
@pytest.mark.parametrize("back", [0, 1])
def test_text_raters(side, back):
    samples = padded(side=side)
    embeddings = draws(samples, 16)
    got = text_raters(samples.pad(embeddings).float(), samples.layout, back)
    positions = question_positions(samples.layout, back)
    for b, flags in enumerate(samples.vision):
        words = [int(p) - samples.layout.starts[b] for p in positions[b] if p >= 0]
        flags = flags[: len(flags) - back]
        assert words == naive_baselines.question(flags)
        raters = [int(p) - samples.layout.starts[b] for p in positions[b][got[b]]]
        assert raters == naive_baselines.text_raters(embeddings[b], flags)


def test_a_single_word_rates():
    samples = padded([[2, 4, 1], [2, 3, 2]])
    embeddings = [torch.ones(len(flags), 3) for flags in samples.vision]
    assert text_raters(samples.pad(embeddings), samples.layout).tolist() == [[False, True], [True, True]]


@sides
def test_vision_scores_and_ranks(side):
    samples = padded([[3, 9, 2, 8, 6], [1, 30, 9], [2, 2, 5], [4, 0, 3]], side)
    layout = samples.layout
    query, key, attention = maps(samples)
    # 4 of the second sample's 9 words look at all alike: their rows are multiples of one
    for word in range(2, 10, 2):
        query[1, :, samples.own(1).stop - word] = 0.0
    positions = question_positions(layout)
    raters = positions >= 0
    raters[0, ::2] = False
    raters[0, -1] = True
    rows = attention_rows(query, key, positions, scale=0.3, key_mask=layout.valid_mask)
    attention, scores = vision_scores(rows, raters, layout)
    ranks = attention_ranks(attention, raters, layout)
    for b, flags in enumerate(samples.vision):
        columns = [i + layout.starts[b] for i, is_vision in enumerate(flags) if is_vision]
        matrix = rows[b][raters[b]][:, columns]
        torch.testing.assert_close(scores[b, columns], matrix.mean(0), **CLOSE)
        assert ranks[b] == (naive_baselines.rank_of(matrix) if columns else 0)
    assert (scores[~layout.vision_mask] == 0).all()
    assert ranks == (int(raters[0].sum()), 9 - 4 + 1, 2, 0)


def test_rank_counts_independent_rows():
    samples = padded([[0, 8, 5]])
    torch.manual_seed(0)
    rows = torch.zeros(1, 5, 13)
    rows[0, :, :8] = torch.rand(5, 2) @ torch.rand(2, 8)
    attention, _ = vision_scores(rows, torch.ones(1, 5, dtype=torch.bool), samples.layout)
    assert attention_ranks(attention, torch.ones(1, 5, dtype=torch.bool), samples.layout) == (2,)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@sides
def test_a_sample_that_is_not_finite_keeps_all_tokens_and_leaves_the_others_alone(side, value):
    samples = padded([[3, 9, 2], [1, 30, 9], [2, 2, 5]], side)
    query, key, _ = maps(samples)
    positions = question_positions(samples.layout)
    rows = attention_rows(query, key, positions, scale=0.3, key_mask=samples.layout.valid_mask)
    attention, _ = vision_scores(rows, positions >= 0, samples.layout)
    want = attention_ranks(attention, positions >= 0, samples.layout)
    attention[1, int((positions[1] >= 0).nonzero()[0]), samples.layout.vision_mask[1]] = value
    assert attention_ranks(attention, positions >= 0, samples.layout) == (want[0], 30, want[2])
    assert SparseVLMConfig().counts_at(0, 30, 30).kept == 30


def clustered(tokens: list[torch.Tensor], clusters: list[int]) -> list[list[naive_baselines.Cluster]]:
    most = max(map(len, tokens))
    batch = torch.full((len(tokens), most, tokens[0].shape[1]), math.nan)
    for b, rows in enumerate(tokens):
        batch[b, : len(rows)] = rows
    sizes = torch.tensor([[len(rows)] for rows in tokens])
    centre, is_centre = density_peaks(batch, sizes, torch.tensor(clusters).unsqueeze(1))
    found = []
    for b, rows in enumerate(tokens):
        assert not is_centre[b, len(rows) :].any()
        own = centre[b, : len(rows)].tolist()
        heads = is_centre[b].nonzero()[:, 0].tolist()
        assert set(own) == set(heads)
        found.append([naive_baselines.Cluster(h, tuple(i for i, c in enumerate(own) if c == h)) for h in heads])
    return found


def test_density_peaks_by_hand():
    blobs = torch.tensor([[0.0, 0.0], [5.0, 5.0], [0.1, 0.0], [5.0, 5.1], [0.0, 0.1], [5.1, 5.0]])
    first, second = clustered([blobs], [2])[0]
    assert first == naive_baselines.Cluster(0, (0, 2, 4)) and second == naive_baselines.Cluster(1, (1, 3, 5))


@settings(deadline=None)
@given(st.integers(0, 2**31), st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=3))
def test_density_peaks(seed, sizes):
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randn(n, 4, generator=generator) for n, _ in sizes]
    clusters = [min(n, k) for n, k in sizes]
    for rows, k, got in zip(tokens, clusters, clustered(tokens, clusters), strict=True):
        margins = naive.Margins()
        want = naive_baselines.density_peaks(list(rows.double()), k, margins)
        if margins.windows > 1e-5:
            assert sorted(want, key=lambda cluster: cluster.centre) == got


def test_density_peaks_of_equal_tokens():
    assert clustered([torch.ones(5, 3)], [2]) == [
        [naive_baselines.Cluster(0, (0, 2, 3, 4)), naive_baselines.Cluster(1, (1,))]
    ]


@sides
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "keep", [[4, 6, 2, 1], [12, 30, 4, 1], [1, 1, 1, 1], [12, 3, 4, 1]], ids=["all", "none", "one left", "some"]
)
def test_sparsify(side, keep, dtype):
    samples = padded(side=side)
    layout = samples.layout
    config = SparseVLMConfig((2,), counts=(1,), recycle_ratio=0.6, tokens_per_cluster=3)
    counts = tuple(
        dataclasses.replace(config, counts=(k,)).counts_at(0, n) for k, n in zip(keep, layout.n_vision, strict=True)
    )
    hidden, scores = draws(samples, 6), draws(samples, seed=5)
    hidden = [rows.to(dtype).double() for rows in hidden]
    # an earlier stage dropped every second token of a sequence twice as long
    source = 2 * torch.arange(layout.width).expand(len(keep), -1)
    short = sparsify(
        samples.pad(hidden).to(dtype), samples.pad(scores).float(), layout, counts, source=source
    )

    expected, merged = [], []
    for b, flags in enumerate(samples.vision):
        attention = [row.tolist() for row in scores[b].expand(len(flags), -1)]
        stage = naive_baselines.sparse_stage(
            list(hidden[b]), flags, attention, [0], keep[b], recycle_ratio=0.6, tokens_per_cluster=3
        )
        assert len(stage.clusters) == counts[b].clusters
        tokens = [Token(h, i, v) for i, (h, v) in enumerate(zip(hidden[b], flags, strict=True))]
        expected.append(naive_baselines.shortened(tokens, stage))
        merged.append({cluster.centre for cluster in stage.clusters})
    assert short.hidden.dtype == dtype
    assert short.layout.lengths == tuple(map(len, expected))
    assert short.layout.width == short.hidden.shape[1] == max(map(len, expected))
    assert short.layout.tails == layout.tails and short.layout.padding_side == layout.padding_side
    for b, want in enumerate(expected):
        start = short.layout.starts[b]
        own = slice(start, start + len(want))
        old = [token.position + layout.starts[b] for token in want]
        assert short.index[b, own].tolist() == [2 * i for i in old]
        assert short.merged[b, own].tolist() == [token.position in merged[b] for token in want]
        assert short.layout.vision_mask[b, own].tolist() == [token.vision for token in want]
        got = short.hidden[b, own].double()
        torch.testing.assert_close(
            got, torch.stack([t.hidden for t in want]), **(CLOSE if dtype == torch.float32 else dict(atol=0, rtol=1e-2))
        )
    padding = ~short.layout.valid_mask
    assert short.residual is short.hidden and torch.equal(short.valid, ~padding)
    assert (short.index[padding] == -1).all() and (short.hidden[padding] == 0).all() and not short.merged[padding].any()
    again = VisionLayout.from_mask(short.layout.vision_mask, short.layout.valid_mask)
    assert torch.equal(again.run_rank, short.layout.run_rank)
    assert (again.lengths, again.n_vision, again.tails) == (
        short.layout.lengths,
        short.layout.n_vision,
        short.layout.tails,
    )


def test_sparsify_without_recycling():
    samples = padded()
    hidden, scores = samples.pad(draws(samples, 6)).float(), samples.pad(draws(samples, seed=5)).float()
    counts = tuple(SparseCounts(max(1, n // 2), 0, 0) for n in samples.layout.n_vision)
    short = sparsify(hidden, scores, samples.layout, counts)
    assert not short.merged.any()
    where = short.index.clamp_min(0).unsqueeze(-1).expand(-1, -1, 6)
    want = torch.where((short.index >= 0).unsqueeze(-1), hidden.gather(1, where), 0)
    assert torch.equal(short.hidden, want)
    assert all((row[row >= 0].diff() > 0).all() for row in short.index)


def test_a_sample_does_not_depend_on_its_neighbours():
    samples = padded()
    hidden, scores = draws(samples, 6), draws(samples, seed=5)
    counts = tuple(SparseVLMConfig((2,), keep_ratios=(0.3,)).counts_at(0, n) for n in samples.layout.n_vision)
    together = sparsify(samples.pad(hidden).float(), samples.pad(scores).float(), samples.layout, counts)
    alone = padded(SHAPES[:1])
    single = sparsify(hidden[0][None].float(), scores[0][None].float(), alone.layout, counts[:1])
    own = together.hidden[0, together.layout.starts[0] :]
    torch.testing.assert_close(own, single.hidden[0], **CLOSE)


# FLOPs; per layer, by hand, as in test_flops.py

PER_TOKEN = 2 * 2 * 2048 * 4096 + 2 * 2 * 2048 * 512 + 2 * 2048 * 128
PER_EXPERT = 6 * 2048 * 768
PER_SQUARE = 2 * 32 * 128


def by_hand(vision: list[int], experts: list[int] | None = None) -> int:
    """FLOPs of layers without a prune stage inside: 100 text tokens and so many vision tokens each."""
    experts = experts or [8] * len(vision)
    return sum(
        (100 + v) * PER_TOKEN + (100 * 8 + v * k) * PER_EXPERT + (100 + v) ** 2 * PER_SQUARE
        for v, k in zip(vision, experts, strict=True)
    )


def test_flops_of_fastv():
    report = fastmmoe.flops(INTERNVL, 100, 1792, FastVConfig(2, 0.5))
    assert report.reduced == by_hand([1792] * 2 + [896] * 46)
    assert [layer.moe_tokens for layer in report.per_layer] == [layer.attention_tokens for layer in report.per_layer]
    both = fastmmoe.flops(INTERNVL, 100, 1792, FastVConfig(2, 0.5, vision_top_k=4, reduction_layer=4))
    assert both.reduced == by_hand([1792] * 2 + [896] * 46, [8] * 4 + [4] * 44)


def test_flops_of_sparsevlm():
    config = SparseVLMConfig((2, 6), counts=(900, 400))
    # 892 go, 268 of them come back as 27; of 927 another 527 go and 159 come back as 16
    report = fastmmoe.flops(INTERNVL, 100, 1792, config)
    assert report.reduced == by_hand([1792] * 3 + [927] * 4 + [416] * 41)
    adaptive = SparseVLMConfig((2, 6))
    with pytest.raises(ValueError, match="rank-adaptive"):
        fastmmoe.flops(INTERNVL, 100, 1792, adaptive)
    assert fastmmoe.flops(INTERNVL, 100, 1792, adaptive, vision_left=[[927], [416]]) == report
    for wrong in ([[927]], [[927, 1], [416, 1]]):
        with pytest.raises(ValueError, match="vision_left: expected 1 counts for each of 2 prune layers"):
            fastmmoe.flops(INTERNVL, 100, 1792, adaptive, vision_left=wrong)


@pytest.mark.parametrize("make", [RandomConfig, UniformConfig])
def test_flops_of_the_blind_are_fastmmoes(make):
    layers = dict(prune_layers=(5, 8, 12), retention=0.5, vision_top_k=4)
    ours = fastmmoe.flops(INTERNVL, [100, 7], [1792, 256], fastmmoe.FastMMoEConfig(**layers))
    assert fastmmoe.flops(INTERNVL, [100, 7], [1792, 256], make(**layers)) == ours


# the oracle of whole models


def stride(layer: int, vision: list[bool], target: int) -> list[int]:
    return naive_baselines.uniform_kept(vision, target)


def test_nothing_pruned_is_the_stock_oracle():
    model = tiny_internvl()
    batch = tiny_batch(model)
    plain = naive.greedy(model, batch, naive.Settings(vision_top_k=2), 3)
    for pruning in (
        naive_baselines.fastv(2, 1.0, vision_top_k=2),
        naive_baselines.sparsevlm((1, 3), (99, 99), vision_top_k=2),
        naive_baselines.blind((1, 3), (1.0, 1.0), stride, vision_top_k=2),
    ):
        same = naive.greedy(model, batch, pruning, 3, samples=naive_baselines.samples)
        for want, got in zip(plain, same, strict=True):
            assert torch.equal(want.prefill.logits, got.prefill.logits) and torch.equal(want.logits, got.logits)


def test_the_oracles_map_is_transformers():
    model = tiny_internvl(attn_implementation="eager")
    batch = tiny_batch(model, images_per_sample=(2,))
    seen = []

    def look(sample, stage, tokens):
        seen.append(sample.map)
        return tokens

    naive_baselines.samples(model, batch, naive_baselines.Pruning((0, 3), look))
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    for layer, rows in zip((0, 3), seen, strict=True):
        want = attentions[layer][0].mean(0)
        for i, row in enumerate(rows):
            torch.testing.assert_close(torch.tensor(row), want[i, : i + 1], atol=1e-4, rtol=1e-3)


def test_the_oracle_prunes_where_the_definition_says():
    model = tiny_internvl()
    batch = tiny_batch(model, images_per_sample=(2,))
    n, vision = int(batch["attention_mask"].sum()), 32
    (fastv,) = naive_baselines.samples(model, batch, naive_baselines.fastv(2, 0.25))
    assert fastv.tokens_per_layer == [n] * 2 + [n - 24] * 4
    assert [len(cache) for cache in fastv.caches] == [n] * 2 + [n - 24] * 4
    # 22 go, 7 of them come back as 1; of 11 another 5 go, 2 of them come back as 1
    (sparse,) = naive_baselines.samples(model, batch, naive_baselines.sparsevlm((1, 3), (10, 6)))
    assert sparse.tokens_per_layer == [n] * 2 + [n - vision + 11] * 2 + [n - vision + 7] * 2
    half = naive_baselines.blind((1, 3), (0.5, 0.5), stride)
    (blind,) = naive_baselines.samples(model, batch, half)
    assert blind.tokens_per_layer == [n] + [n - 16] * 2 + [n - 24] * 3
    assert [len(cache) for cache in blind.caches] == [n] * 2 + [n - 16] * 2 + [n - 24] * 2
