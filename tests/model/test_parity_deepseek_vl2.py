"""An enabled DeepSeek-VL2 against the oracle in naive_deepseek.py: logits, greedy tokens, and what the report says.

As in test_parity_internvl.py, each case has a seed for which no choice is too narrow for float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import pytest
import torch

import fastmmoe
from fastmmoe import FastMMoEConfig

from . import naive, naive_deepseek
from .tiny_deepseek import IMAGE_TOKEN, VARIANTS, tiny_deepseek_batch, tiny_deepseek_vl2

STEPS = 6
TOLERANCE = dict(atol=1e-3, rtol=1e-3)
NARROWEST = dict(routing=1e-5, windows=1e-3, tokens=1e-3, logits=1e-2)


@dataclass(frozen=True)
class Case:
    """Keywords of FastMMoEConfig, and of the batch."""

    config: dict
    batch: dict = field(default_factory=dict)


# layer 0 is dense; the presets' weights, at layers this model has
PRESET = dict(prune_layers=(1, 2, 4), retention=0.5, merge_ratio=0.05, alpha=0.3, vision_top_k=2)
TWO_STAGES = dict(prune_layers=(1, 3), retention=0.4, merge_ratio=0.3, window=2, vision_top_k=1, reduction_layer=0)

CASES = {
    "preset": Case(PRESET),
    "two-stages": Case(TWO_STAGES),
    "routing-similarity": Case(TWO_STAGES | dict(strategy="routing_similarity")),
    "dynamic-attention-mean": Case(TWO_STAGES | dict(strategy="dynamic_attention", merge_method="mean")),
    "experts-only": Case(dict(vision_top_k=2)),
    "prune-only": Case(dict(prune_layers=(2,), retention=0.5, merge_ratio=0.2)),
    "no-image-in-a-sample": Case(TWO_STAGES, batch=dict(crops=(((1, 1), (1, 1)), (), ((2, 2),)))),
    "starts-with-an-image": Case(TWO_STAGES, batch=dict(text=(0, 1, 1))),
}

# the first seed of each case and variant that `oracle` does not object to, where that is not 0
SEEDS = {
    "preset": dict(tiny=1, small=4, base=1),
    "two-stages": dict(tiny=1, base=1),
    "routing-similarity": dict(base=2),
    "dynamic-attention-mean": dict(small=2, base=2),
    "experts-only": dict(tiny=1),
    "prune-only": dict(tiny=2, small=2),
    "no-image-in-a-sample": dict(tiny=1, base=8),
    "starts-with-an-image": dict(base=5),
}


def stock(variant: str, name: str, attn_implementation: str = "sdpa", padding_side: str = "left"):
    """A case's model, not enabled, and its batch."""
    seed = SEEDS[name].get(variant, 0)
    model = tiny_deepseek_vl2(variant, seed, attn_implementation=attn_implementation)
    return model, tiny_deepseek_batch(**CASES[name].batch, seed=seed, padding_side=padding_side)


def settings(name: str) -> naive.Settings:
    """The oracle's settings, from the same keywords but without help from the package."""
    given = dict(CASES[name].config)
    stages = len(given.get("prune_layers", ()))
    retention = given.pop("retention", 1.0)
    return naive.Settings(**given, stage_keep_ratios=(retention ** (1 / max(stages, 1)),) * stages)


@cache
def oracle(variant: str, name: str) -> list[naive.Generation]:
    model, batch = stock(variant, name)
    generations = naive_deepseek.greedy(model, batch, settings(name), STEPS)
    for sample, generation in enumerate(generations):
        narrow = {kind: gap for kind, gap in generation.margins.items() if gap < NARROWEST[kind]}
        assert not narrow, f"sample {sample} makes a choice too narrow for float32 ({narrow}): take another seed"
    return generations


def assert_logits_match(logits: torch.Tensor, batch: dict, generations: list[naive.Generation]) -> None:
    """Logits keep the input's shape; those of the survivors, the last token among them, are the oracle's."""
    assert logits.shape[:2] == batch["input_ids"].shape
    for sample, prefill in enumerate(generation.prefill for generation in generations):
        got = logits[sample][batch["attention_mask"][sample].bool()].double()
        torch.testing.assert_close(got[list(prefill.positions)], prefill.logits, **TOLERANCE)
        assert prefill.positions[-1] == len(got) - 1


def logits_of(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def generate(model, batch):
    return model.generate(
        **batch, do_sample=False, max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True
    )


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_generate_equal_the_oracle(variant, name, attn_implementation):
    model, batch = stock(variant, name, attn_implementation)
    fastmmoe.enable(model, FastMMoEConfig(**CASES[name].config))
    want = oracle(variant, name)
    assert_logits_match(logits_of(model, batch), batch, want)
    out = generate(model, batch)
    for sample, generation in enumerate(want):
        assert out.sequences[sample, -STEPS:].tolist() == generation.ids, f"sample {sample}"
        got = torch.stack([step[sample] for step in out.logits]).double()
        torch.testing.assert_close(got, generation.logits, **TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_right_padding(variant):
    model, batch = stock(variant, "two-stages", padding_side="right")
    fastmmoe.enable(model, FastMMoEConfig(**CASES["two-stages"].config))
    assert_logits_match(logits_of(model, batch), batch, oracle(variant, "two-stages"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_mask_says_what_is_vision(variant):
    """Whatever ids stand under it, and in integers too."""
    model, batch = stock(variant, "two-stages")
    batch["input_ids"] = torch.where(batch["images_seq_mask"], 7, batch["input_ids"])
    batch["images_seq_mask"] = batch["images_seq_mask"].long()
    fastmmoe.enable(model, FastMMoEConfig(**CASES["two-stages"].config))
    assert_logits_match(logits_of(model, batch), batch, oracle(variant, "two-stages"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_report_tells_what_the_oracle_saw(variant):
    name = "no-image-in-a-sample"
    model, batch = stock(variant, name)
    fastmmoe.enable(model, FastMMoEConfig(**CASES[name].config))
    generate(model, batch)
    report = fastmmoe.report(model)
    prefills = [generation.prefill for generation in oracle(variant, name)]
    vision = batch["images_seq_mask"].sum(1).tolist()
    assert list(report.n_vision) == vision
    valid = batch["attention_mask"].sum(1).tolist()
    assert list(report.n_text) == [n - n_vis for n, n_vis in zip(valid, vision, strict=True)]
    assert [list(row) for row in zip(*report.tokens_per_layer, strict=True)] == [
        list(prefill.tokens_per_layer) for prefill in prefills
    ]
    for sample, prefill in enumerate(prefills):
        for got, want in zip(report.stages, prefill.stages, strict=True):
            counts = len(want.entering), len(want.kept), len(want.merged)
            assert (got.entering[sample], got.kept[sample], got.merged[sample]) == counts
    assert 0 < report.flops.saved < 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_disable_restores_every_bit(variant):
    model, batch = stock(variant, "preset")
    before = logits_of(model, batch)
    with fastmmoe.enabled(model, FastMMoEConfig(**PRESET)):
        assert (logits_of(model, batch)[:, -1] - before[:, -1]).abs().max() > 0.1, "enabling had no effect"
    assert torch.equal(logits_of(model, batch), before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_text_only_input_is_bit_identical(variant):
    model = tiny_deepseek_vl2(variant)
    batch = tiny_deepseek_batch(crops=((), ()))
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    denied = tiny_deepseek_batch(crops=(((1, 1),),))  # a mask, but no crop: the model reads text
    denied["images_spatial_crop"].zero_()
    before = [logits_of(model, inputs) for inputs in (batch, text, denied)]
    fastmmoe.enable(model, FastMMoEConfig(**TWO_STAGES))
    for inputs, want in zip((batch, text, denied), before, strict=True):
        assert torch.equal(logits_of(model, inputs), want)


def test_a_generated_placeholder_is_text():
    model, batch = stock("small", "two-stages")
    first = oracle("small", "two-stages")[0].ids[0]
    with torch.no_grad():  # make the first sample say the placeholder where it said `first`
        model.lm_head.weight[[first, IMAGE_TOKEN]] = model.lm_head.weight[[IMAGE_TOKEN, first]]
    want = naive_deepseek.greedy(model, batch, settings("two-stages"), STEPS)
    assert want[0].ids[0] == IMAGE_TOKEN and min(w.margins["logits"] for w in want) > NARROWEST["logits"]
    fastmmoe.enable(model, FastMMoEConfig(**TWO_STAGES))
    assert generate(model, batch).sequences[:, -STEPS:].tolist() == [w.ids for w in want]


def test_the_preset_fits_the_model_and_refuses_its_dense_layer():
    model = tiny_deepseek_vl2("base", num_hidden_layers=9)
    config = FastMMoEConfig.preset(model, retention=0.5)
    assert config == FastMMoEConfig(
        vision_top_k=2, prune_layers=(2, 5, 8), retention=0.5, alpha=0.3, merge_ratio=0.05, reduction_layer=2, window=3
    )
    fastmmoe.enable(model, config)
    logits_of(model, tiny_deepseek_batch())
    assert [stage.layer for stage in fastmmoe.report(model).stages] == [2, 5, 8]
    with pytest.raises(ValueError, match="prune_layers: layer 0 is not a MoE layer"):
        fastmmoe.enable(model, FastMMoEConfig(prune_layers=(0,), retention=0.5))
