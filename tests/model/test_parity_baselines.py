"""Models enabled with a baseline against the oracle in naive_baselines.py: logits, greedy tokens, report and FLOPs.

As in test_parity_internvl.py, each case has a seed for which no choice is too narrow for float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, partial

import pytest
import torch
from transformers import DynamicCache, StaticCache

import fastmmoe
from fastmmoe.config import ReductionConfig
from fastmmoe.methods import FastVConfig, RandomConfig, SparseVLMConfig, UniformConfig
from fastmmoe.methods.random import random_importance
from fastmmoe_kernels import VisionLayout

from . import naive, naive_baselines, naive_deepseek
from .test_enable import traces
from .test_parity_internvl import (
    NARROWEST,
    STEPS,
    TOLERANCE,
    assert_generation_matches,
    assert_logits_match,
    generate,
    logits_of,
)
from .tiny import FIRST_WORD, IMAGE_TOKEN, LAST_WORD, tiny_batch, tiny_internvl
from .tiny_deepseek import tiny_deepseek_batch, tiny_deepseek_vl2


@dataclass(frozen=True)
class Case:
    """A config, the same for the oracle, and the batch: by default one and two images, left-padded."""

    config: ReductionConfig
    oracle: naive_baselines.Pruning
    batch: dict = field(default_factory=dict)


def stride(layer: int, vision: list[bool], target: int) -> list[int]:
    return naive_baselines.uniform_kept(vision, target)


def draw(seed: int, layer: int, vision: list[bool], target: int) -> list[int]:
    """The package's own draw, for a sample that is alone and has no padding."""
    importance = random_importance(VisionLayout.from_mask(torch.tensor([vision])), seed, layer)[0].tolist()
    indices = [i for i, is_vision in enumerate(vision) if is_vision]
    return sorted(indices, key=lambda i: -importance[i])[:target]


def fastv(**options) -> Case:
    return Case(FastVConfig(**options), naive_baselines.fastv(**options))


def sparse(layers: tuple[int, ...], counts: tuple[int, ...] | None = None, experts=(), **options) -> Case:
    experts = dict(experts)
    config = SparseVLMConfig(layers, counts, **options, **experts)
    return Case(config, naive_baselines.sparsevlm(layers, counts, options, **experts))


FEWER = dict(vision_top_k=2, reduction_layer=1)
TWO = dict(prune_layers=(1, 3), keep_ratios=(0.6, 0.5))
CASES = {
    "fastv": fastv(layer=2, retention=0.4),
    "fastv-mean": fastv(layer=2, retention=0.4, query="mean"),
    "fastv-first-layer": fastv(layer=1, retention=0.3),
    "fastv-last-layer": fastv(layer=5, retention=0.5, query="mean"),
    "fastv-one-left": fastv(layer=3, retention=1e-3),
    "fastv-fewer-experts": fastv(layer=3, retention=0.4, **FEWER),
    "sparse-counts": sparse((1, 3), (13, 6)),
    "sparse-rank": sparse((1, 3), rank_scale=3.0),
    "sparse-rank-of-v1": sparse((0, 2, 4)),
    "sparse-only-the-longer-sample": sparse((2,), (16,)),
    "sparse-without-recycling": sparse((0, 4), (9, 5), recycle_ratio=0.0),
    # the last stage drops one token, which comes back alone: at another place, so it is not nothing
    "sparse-clusters": sparse((1, 2, 3), (10, 8, 9), recycle_ratio=0.6, tokens_per_cluster=3),
    "sparse-fewer-experts": sparse((1, 3), (13, 6), FEWER),
    "random": Case(RandomConfig(**TWO, seed=5), naive_baselines.blind((1, 3), (0.6, 0.5), partial(draw, 5))),
    "uniform": Case(UniformConfig(**TWO), naive_baselines.blind((1, 3), (0.6, 0.5), stride)),
    "uniform-fewer-experts": Case(
        UniformConfig(**TWO, **FEWER), naive_baselines.blind((1, 3), (0.6, 0.5), stride, **FEWER)
    ),
}
CASES |= {
    f"{name}-{batch}": Case(CASES[name].config, CASES[name].oracle, options)
    for batch, options in {
        "no-image-in-a-sample": dict(images_per_sample=(2, 0, 1)),
        "adjacent-images": dict(images_per_sample=(3, 1), text=(2, 0, 3)),
        "single-sample": dict(images_per_sample=(2,)),
    }.items()
    for name in ("fastv-mean", "sparse-counts", "sparse-rank", "random")
}

# the first seed of each case that `oracle` does not object to, where that is not 0
SEEDS = {
    "fastv": 1,
    "fastv-mean": 2,
    "fastv-one-left": 6,
    "fastv-fewer-experts": 1,
    "sparse-counts": 1,
    "sparse-rank": 1,
    "sparse-rank-of-v1": 1,
    "sparse-only-the-longer-sample": 1,
    "sparse-without-recycling": 1,
    "sparse-clusters": 6,
    "sparse-fewer-experts": 1,
    "sparse-counts-no-image-in-a-sample": 5,
    "sparse-rank-no-image-in-a-sample": 4,
    "fastv-mean-adjacent-images": 14,
    "sparse-counts-adjacent-images": 1,
    "sparse-rank-adjacent-images": 7,
    "random-adjacent-images": 1,
    "sparse-counts-single-sample": 1,
}


def stock(name: str, attn_implementation: str = "sdpa", padding_side: str = "left"):
    """A case's model, not enabled, and its batch."""
    seed = SEEDS.get(name, 0)
    model = tiny_internvl(seed, attn_implementation=attn_implementation)
    return model, tiny_batch(model, **CASES[name].batch, seed=seed, padding_side=padding_side)


@cache
def oracle(name: str) -> list[naive.Generation]:
    """One result per sample of a case; padding does not reach the oracle, so it holds for either side."""
    model, batch = stock(name)
    generations = naive.greedy(model, batch, CASES[name].oracle, STEPS, samples=naive_baselines.samples)
    refuse_narrow_choices(generations)
    return generations


def refuse_narrow_choices(generations: list[naive.Generation]) -> None:
    for sample, generation in enumerate(generations):
        narrow = {kind: gap for kind, gap in generation.margins.items() if gap < NARROWEST[kind]}
        assert not narrow, f"sample {sample} makes a choice too narrow for float32 ({narrow}): take another seed"


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_generate_equal_the_oracle(name, attn_implementation):
    model, batch = stock(name, attn_implementation)
    fastmmoe.enable(model, CASES[name].config)
    assert_logits_match(logits_of(model, batch), batch, oracle(name))
    assert_generation_matches(generate(model, batch, output_logits=True), oracle(name))


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in CASES if "single" not in name])
def test_right_padding(name, attn_implementation):
    model, batch = stock(name, attn_implementation, padding_side="right")
    fastmmoe.enable(model, CASES[name].config)
    assert_logits_match(logits_of(model, batch), batch, oracle(name))


def cache_lengths(model, batch) -> list[int]:
    """Length of every layer's cache after a prefill."""
    kv_cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(**batch, past_key_values=kv_cache, use_cache=True)
    return [kv_cache.get_seq_length(layer) for layer in range(6)]


@pytest.mark.parametrize("name", CASES)
def test_report_tells_what_the_oracle_saw(name):
    model, batch = stock(name)
    config = CASES[name].config
    fastmmoe.enable(model, config)
    lengths = cache_lengths(model, batch)
    report = fastmmoe.report(model)
    prefills = [generation.prefill for generation in oracle(name)]
    assert lengths == [max(row) for row in zip(*(p.cache_lengths for p in prefills), strict=True)]
    assert [list(row) for row in zip(*report.tokens_per_layer, strict=True)] == [
        list(prefill.tokens_per_layer) for prefill in prefills
    ]
    assert [stage.layer for stage in report.stages] == list(config.prune_layers)
    left = []
    for number, got in enumerate(report.stages):
        for sample, prefill in enumerate(prefills):
            want = prefill.stages[number]
            all_vision = prefill.stages[0].entering
            merged = [position for (position,) in want.merged]
            counts = len(want.entering), len(want.kept), len(merged), len(want.dropped)
            assert (got.entering[sample], got.kept[sample], got.merged[sample], got.dropped[sample]) == counts
            fate = [0 if p in want.kept else 1 if p in merged else 2 if p in want.entering else 3 for p in all_vision]
            assert got.fate[sample].tolist() == fate
        left.append([len(p.stages[number].kept) + len(p.stages[number].merged) for p in prefills])
    assert report.flops == fastmmoe.flops(model, report.n_text, report.n_vision, config, vision_left=left)
    assert 0 < report.flops.saved < 1
    assert f"layer {config.prune_layers[0]:>3}:" in str(report) and report.to_dict()["flops"]["saved"] > 0


BASELINES = ["fastv", "fastv-mean", "sparse-counts", "sparse-rank", "random", "uniform-fewer-experts"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", BASELINES)
def test_candidates_behind_the_prompt_do_not_ask(name, seed):
    """With more logits wanted than one, the token in front of them is the prompt's last."""
    model, batch = stock(name)
    fastmmoe.enable(model, CASES[name].config)
    words = torch.randint(FIRST_WORD, LAST_WORD, (2, 30), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat((batch["input_ids"], words), 1)
    mask = torch.cat((batch["attention_mask"], torch.ones_like(words)), 1)
    with torch.no_grad():
        out = model(**batch | {"input_ids": ids, "attention_mask": mask}, logits_to_keep=31)
    want = torch.stack([generation.prefill.logits[-1] for generation in oracle(name)])
    torch.testing.assert_close(out.logits[:, 0].double(), want, **TOLERANCE)


@pytest.mark.parametrize("name", ["fastv-mean", "sparse-counts"])
def test_prompt_lookup_decoding_equals_greedy(name):
    model = tiny_internvl()
    batch = tiny_batch(model, (2,), text=(2, 2, 6))
    fastmmoe.enable(model, CASES[name].config)
    want = generate(model, batch, max_new_tokens=12)
    assert generate(model, batch, max_new_tokens=12, prompt_lookup_num_tokens=3).sequences.equal(want.sequences)


@pytest.mark.parametrize("name", BASELINES)
def test_static_cache(name):
    model, batch = stock(name)
    fastmmoe.enable(model, CASES[name].config)
    options = dict(cache_implementation="static", disable_compile=True)
    assert_generation_matches(generate(model, batch, output_logits=True, **options), oracle(name))


@pytest.mark.parametrize("name", BASELINES)
def test_second_turn_with_a_new_image(name):
    """The new image is pruned, behind a pruned cache; padding and a static cache change nothing."""
    model = tiny_internvl()
    first, second = tiny_batch(model, (2,), seed=1), tiny_batch(model, (1,), seed=2)
    fastmmoe.enable(model, CASES[name].config)
    results = []
    text_config = model.config.text_config
    caches = DynamicCache(config=text_config), DynamicCache(config=text_config), StaticCache(text_config, 128)
    for padding, kv_cache in zip((0, 3, 0), caches, strict=True):
        n, new = first["input_ids"].shape[1], second["input_ids"].shape[1]
        pad = partial(torch.nn.functional.pad, pad=(padding, 0))
        mask, position = pad(torch.ones(1, n + new, dtype=torch.long)), torch.arange(n + new)[None]
        inputs = dict(input_ids=pad(first["input_ids"]), attention_mask=mask[:, :-new])
        inputs |= dict(pixel_values=first["pixel_values"], position_ids=pad(position[:, :n]))
        with torch.no_grad():
            model(**inputs, past_key_values=kv_cache, use_cache=True)
            inputs = second | dict(attention_mask=mask, position_ids=position[:, n:])
            results.append(model(**inputs, past_key_values=kv_cache, use_cache=True).logits)
        report = fastmmoe.report(model)
        assert report.n_vision == (16,) and sum(report.stages[0].dropped) > 0
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)
    torch.testing.assert_close(results[2], results[0], **TOLERANCE)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", BASELINES)
def test_fixed_layout_and_ids_instead_of_embeddings(name, padding_side):
    model, batch = stock(name, padding_side=padding_side)
    fastmmoe.enable(model, CASES[name].config)
    layout = VisionLayout.from_mask(batch["input_ids"] == IMAGE_TOKEN, batch["attention_mask"])
    with fastmmoe.fixed_layout(model, layout):
        assert_logits_match(logits_of(model, batch), batch, oracle(name))
        # a text model that is called by itself embeds the ids itself
        ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
        text = model.model.language_model
        with torch.no_grad():
            by_ids = text(**ids).last_hidden_state
            embedded = text.embed_tokens(ids.pop("input_ids"))
            assert torch.equal(text(inputs_embeds=embedded, **ids).last_hidden_state, by_ids)


# nothing left behind, nothing changed where nothing is asked for


@pytest.mark.parametrize("name", BASELINES)
def test_disable_restores_every_bit(name):
    model, batch = stock(name)
    before, ids = logits_of(model, batch), generate(model, batch).sequences
    fastmmoe.enable(model, CASES[name].config)
    during = logits_of(model, batch)
    assert (during[:, -1] - before[:, -1]).abs().max() > 0.1, "enabling had no effect"
    generate(model, batch)
    fastmmoe.disable(model)
    assert traces(model) == []
    assert torch.equal(logits_of(model, batch), before)
    assert torch.equal(generate(model, batch).sequences, ids)
    with fastmmoe.enabled(model, CASES[name].config):
        assert torch.equal(logits_of(model, batch), during)
    assert torch.equal(logits_of(model, batch), before)


KEEP_ALL = [
    FastVConfig(retention=1.0),
    SparseVLMConfig((1, 3), counts=(99, 99)),
    RandomConfig((1,)),
    UniformConfig((1, 3), keep_ratios=(1.0, 1.0)),
    FastVConfig(min_vision_tokens=99),
    SparseVLMConfig((1, 3), min_vision_tokens=99),
]


@pytest.mark.parametrize("config", KEEP_ALL, ids=str)
def test_configs_that_change_nothing_are_bit_identical(config):
    model = tiny_internvl()
    batch = tiny_batch(model)
    want = generate(model, batch, output_logits=True)
    fastmmoe.enable(model, config)
    got = generate(model, batch, output_logits=True)
    assert torch.equal(got.sequences, want.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))
    report = fastmmoe.report(model)
    assert report.flops.saved == 0 and report.skipped == (config.min_vision_tokens > 0)


@pytest.mark.parametrize("name", BASELINES)
def test_text_alone_is_bit_identical(name):
    model = tiny_internvl()
    batch = tiny_batch(model, images_per_sample=(0, 0), text=(6, 0, 6))
    before = logits_of(model, batch)
    fastmmoe.enable(model, CASES[name].config)
    assert torch.equal(logits_of(model, batch), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FastVConfig(layer=6), "layer=6: the model has 6 layers"),
        (SparseVLMConfig(), r"layers=\(2, 6, 15, 19\): the model has 6 layers"),
        (RandomConfig((6,), 0.5), r"prune_layers=\(6,\)"),
        (UniformConfig((1, 2), 0.5), "prune_layers: layer 2 is not a MoE layer"),
        (FastVConfig(vision_top_k=5), "vision_top_k=5"),
        (FastVConfig(backend="triton"), "TRITON_INTERPRET"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_config_that_does_not_fit_leaves_the_model_as_it_was(config, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = tiny_internvl(mlp_only_layers=[2])
    batch = tiny_batch(model)
    with pytest.raises((ValueError, RuntimeError), match=message):
        fastmmoe.enable(model, config)
    assert traces(model) == []
    fastmmoe.enable(model, FastVConfig(retention=0.3))
    before = logits_of(model, batch)
    with pytest.raises((ValueError, RuntimeError), match=message):
        fastmmoe.enable(model, config)
    assert torch.equal(logits_of(model, batch), before)


def test_a_dense_layer_can_be_pruned_behind():
    """Only what prunes in front of the experts needs them there."""
    model = tiny_internvl(1, mlp_only_layers=[1])
    batch = tiny_batch(model, seed=1)
    for case in (fastv(layer=2, retention=0.4), sparse((1, 3), (13, 6))):
        want = naive.greedy(model, batch, case.oracle, 2, samples=naive_baselines.samples)
        refuse_narrow_choices(want)
        with fastmmoe.enabled(model, case.config):
            assert_logits_match(logits_of(model, batch), batch, want)


# DeepSeek-VL2


class DeepSeekSample(naive_baselines.Sample, naive_deepseek.Sample):
    """One prompt of DeepSeek-VL2 under a baseline."""


DEEPSEEK = {"fastv-mean": "tiny", "fastv-first-layer": "small", "sparse-counts": "small", "sparse-rank": "base"}
DEEPSEEK_SEEDS = {"fastv-mean": 2, "sparse-counts": 1, "sparse-rank": 5}


@cache
def deepseek_oracle(name: str) -> list[naive.Generation]:
    seed = DEEPSEEK_SEEDS.get(name, 0)
    samples = partial(naive_deepseek.samples, kind=DeepSeekSample)
    model, batch = tiny_deepseek_vl2(DEEPSEEK[name], seed), tiny_deepseek_batch(seed=seed)
    generations = naive.greedy(model, batch, CASES[name].oracle, STEPS, samples=samples)
    refuse_narrow_choices(generations)
    return generations


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DEEPSEEK)
def test_deepseek(name, attn_implementation):
    seed = DEEPSEEK_SEEDS.get(name, 0)
    model = tiny_deepseek_vl2(DEEPSEEK[name], seed, attn_implementation=attn_implementation)
    batch = tiny_deepseek_batch(seed=seed)
    fastmmoe.enable(model, CASES[name].config)
    assert_logits_match(logits_of(model, batch), batch, deepseek_oracle(name))
    assert_generation_matches(generate(model, batch, output_logits=True), deepseek_oracle(name))
    prefills = [generation.prefill for generation in deepseek_oracle(name)]
    tokens = fastmmoe.report(model).tokens_per_layer
    assert list(tokens) == list(zip(*(prefill.tokens_per_layer for prefill in prefills), strict=True))
