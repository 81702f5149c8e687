"""An enabled InternVL against the oracle in naive.py: logits, greedy tokens, beams, and what the report says.

The model has random weights, the method makes hard choices (which token, which window, which expert), and the enabled
model runs in float32: where two candidates nearly tie, rounding would decide, and a correct result could differ
from the oracle's. So each case has a seed for which none of its choices is that narrow; `oracle` checks that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import product

import pytest
import torch

import fastmmoe

from . import naive
from .tiny import IMAGE_TOKEN, PAD_TOKEN, TOKENS_PER_TILE, tiny_batch, tiny_internvl

STEPS = 8
# float32 leaves errors of about 1e-5 in logits of unit scale; any wrong choice changes them by 0.1 and more
TOLERANCE = dict(atol=1e-3, rtol=1e-3)
NARROWEST = dict(routing=1e-5, windows=1e-3, tokens=1e-3, logits=1e-2)


@dataclass(frozen=True)
class Case:
    """Keywords of FastMMoEConfig, of the tiny model, and of its batch: by default one and two images, left-padded."""

    config: dict
    model: dict = field(default_factory=dict)
    batch: dict = field(default_factory=dict)


ONE_STAGE = dict(prune_layers=(2,), retention=0.5, merge_ratio=0.2)
STAGES = {
    1: ONE_STAGE | dict(vision_top_k=2),
    2: dict(prune_layers=(1, 3), retention=0.4, merge_ratio=0.3, window=2, vision_top_k=1, reduction_layer=0),
    # first layer and last one; odd shares; pruning where vision tokens still have all their experts
    3: dict(prune_layers=(0, 2, 5), keep_ratios=(0.8, 0.7, 0.6), merge_ratio=0.25, window=4, alpha=0.3)
    | dict(vision_top_k=3, reduction_layer=3),
}
STRATEGIES = ("hybrid", "routing_similarity", "dynamic_attention")

CASES = {
    f"{strategy}-{method}-{stages}-stage": Case(STAGES[stages] | dict(strategy=strategy, merge_method=method))
    for strategy, method, stages in product(STRATEGIES, ("mlerp", "mean"), STAGES)
} | {
    "experts-only": Case(dict(vision_top_k=2)),
    "one-expert-everywhere": Case(dict(vision_top_k=1, reduction_layer=0)),
    "prune-only": Case(ONE_STAGE),
    "drop-without-merging": Case(STAGES[2] | dict(merge_ratio=0.0)),
    "merge-all-it-can": Case(ONE_STAGE | dict(merge_ratio=1.0, vision_top_k=2)),
    "one-token-left": Case(dict(prune_layers=(1, 4), retention=1e-3)),
    "windows-of-one": Case(STAGES[2] | dict(window=1)),
    "official-defaults": Case(dict(vision_top_k=2, prune_layers=(1, 2, 4), retention=0.75)),
    "no-image-in-a-sample": Case(STAGES[2], batch=dict(images_per_sample=(2, 0, 1))),
    "single-sample": Case(STAGES[2], batch=dict(images_per_sample=(2,))),
    "equal-images": Case(STAGES[2], batch=dict(images_per_sample=(1, 1, 1))),
    "adjacent-images": Case(STAGES[2], batch=dict(images_per_sample=(3, 1), text=(2, 0, 3))),
    "starts-with-an-image": Case(STAGES[2], batch=dict(images_per_sample=(1, 2), text=(0, 1, 1))),
    "weights-not-normalised": Case(STAGES[2], model=dict(norm_topk_prob=False)),
    "dense-layer": Case(STAGES[2], model=dict(mlp_only_layers=[0, 2])),
    "keep-by-redundancy": Case(STAGES[1] | dict(keep_by="redundancy", alpha=0.75)),
    "keep-by-redundancy-2-stage": Case(STAGES[2] | dict(keep_by="redundancy", window=3)),
    "one-kv-head": Case(STAGES[2], model=dict(num_key_value_heads=1)),
}

# the first seed of each case that `oracle` does not object to, where that is not 0
SEEDS = {
    "hybrid-mlerp-1-stage": 1,
    "hybrid-mlerp-2-stage": 1,
    "hybrid-mlerp-3-stage": 1,
    "hybrid-mean-1-stage": 1,
    "routing_similarity-mean-1-stage": 1,
    "routing_similarity-mean-2-stage": 2,
    "routing_similarity-mean-3-stage": 1,
    "dynamic_attention-mlerp-1-stage": 1,
    "dynamic_attention-mean-1-stage": 1,
    "experts-only": 1,
    "one-token-left": 1,
    "windows-of-one": 5,
    "no-image-in-a-sample": 4,
    "adjacent-images": 1,
    "starts-with-an-image": 1,
    "one-kv-head": 2,
}


def stock(name: str, attn_implementation: str = "sdpa", padding_side: str = "left"):
    """A case's model, not enabled, and its batch."""
    case, seed = CASES[name], SEEDS.get(name, 0)
    model = tiny_internvl(seed, attn_implementation=attn_implementation, **case.model)
    return model, tiny_batch(model, **case.batch, seed=seed, padding_side=padding_side)


def settings(name: str) -> naive.Settings:
    """The oracle's settings, from the same keywords but without help from the package."""
    given = dict(CASES[name].config)
    stages = len(given.get("prune_layers", ()))
    retention, ratios = given.pop("retention", 1.0), given.pop("keep_ratios", None)
    return naive.Settings(**given, stage_keep_ratios=ratios or (retention ** (1 / max(stages, 1)),) * stages)


@cache
def oracle(name: str) -> list[naive.Generation]:
    """One result per sample of a case; padding does not reach the oracle, so it holds for either side."""
    model, batch = stock(name)
    generations = naive.greedy(model, batch, settings(name), STEPS)
    for sample, generation in enumerate(generations):
        narrow = {kind: gap for kind, gap in generation.margins.items() if gap < NARROWEST[kind]}
        assert not narrow, f"sample {sample} makes a choice too narrow for float32 ({narrow}): take another seed"
    return generations


def generate(model, batch, **options):
    options = dict(do_sample=False, max_new_tokens=STEPS, return_dict_in_generate=True) | options
    return model.generate(**batch, **options)


def logits_of(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def assert_logits_match(logits: torch.Tensor, batch: dict, generations: list[naive.Generation]) -> None:
    """Logits keep the input's shape; those of the survivors, the last token among them, are the oracle's."""
    assert logits.shape[:2] == batch["input_ids"].shape
    for sample, prefill in enumerate(generation.prefill for generation in generations):
        got = logits[sample][batch["attention_mask"][sample].bool()].double()
        torch.testing.assert_close(got[-1], prefill.logits[-1], **TOLERANCE)
        torch.testing.assert_close(got[list(prefill.positions)], prefill.logits, **TOLERANCE)


def assert_generation_matches(out, generations: list[naive.Generation]) -> None:
    for sample, want in enumerate(generations):
        assert out.sequences[sample, -STEPS:].tolist() == want.ids, f"sample {sample}"
        got = torch.stack([step[sample] for step in out.logits]).double()
        torch.testing.assert_close(got, want.logits, **TOLERANCE)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_generate_equal_the_oracle(name, attn_implementation):
    model, batch = stock(name, attn_implementation)
    fastmmoe.enable(model, fastmmoe.FastMMoEConfig(**CASES[name].config))
    assert_logits_match(logits_of(model, batch), batch, oracle(name))
    assert_generation_matches(generate(model, batch, output_logits=True), oracle(name))


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["hybrid-mlerp-2-stage", "no-image-in-a-sample", "experts-only"])
def test_right_padding(name, attn_implementation):
    model, batch = stock(name, attn_implementation, padding_side="right")
    fastmmoe.enable(model, fastmmoe.FastMMoEConfig(**CASES[name].config))
    assert_logits_match(logits_of(model, batch), batch, oracle(name))


def test_last_logits_only():
    """`logits_to_keep=1`, as generate asks for, looks from the same query token as a full forward."""
    name = "hybrid-mlerp-2-stage"
    model, batch = stock(name)
    fastmmoe.enable(model, fastmmoe.FastMMoEConfig(**CASES[name].config))
    with torch.no_grad():
        logits = model(**batch, logits_to_keep=1).logits
    assert logits.shape[1] == 1
    want = torch.stack([generation.logits[0] for generation in oracle(name)])
    torch.testing.assert_close(logits[:, 0].double(), want, **TOLERANCE)


def test_a_generated_image_token_is_text():
    """It gets all its experts and starts no pruning, though its id says image."""
    name = "hybrid-mlerp-2-stage"
    model, batch = stock(name)
    first = oracle(name)[0].ids[0]
    with torch.no_grad():  # make the first sample say "image" where it said `first`
        model.lm_head.weight[[first, IMAGE_TOKEN]] = model.lm_head.weight[[IMAGE_TOKEN, first]]
    want = naive.greedy(model, batch, settings(name), STEPS)
    assert want[0].ids[0] == IMAGE_TOKEN and min(w.margins["logits"] for w in want) > NARROWEST["logits"]
    fastmmoe.enable(model, fastmmoe.FastMMoEConfig(**CASES[name].config))
    assert_generation_matches(generate(model, batch, output_logits=True), want)


@pytest.mark.parametrize("name", ["hybrid-mlerp-2-stage", "hybrid-mean-3-stage"])
def test_beam_search(name):
    """Each beam's score is what the oracle gives its tokens: the caches follow when beams are reordered."""
    model, batch = stock(name)
    # no length penalty: a score is the sum of the log probabilities
    beams = dict(num_beams=2, num_return_sequences=2, length_penalty=0.0, output_scores=True)
    fastmmoe.enable(model, fastmmoe.FastMMoEConfig(**CASES[name].config))
    out = generate(model, batch, **beams)
    alone = [generate(model, sample, **beams) for sample in split(batch)]
    fastmmoe.disable(model)

    tokens = out.sequences[:, -STEPS:].view(2, 2, STEPS)  # [sample, beam, step]
    scores = out.sequences_scores.view(2, 2)
    for beam in range(2):
        want = naive.log_probability(model, batch, settings(name), tokens[:, beam].tolist())
        assert scores[:, beam].tolist() == pytest.approx(want, abs=1e-3)
    for sample in range(2):
        assert tokens[sample].tolist() == alone[sample].sequences[:, -STEPS:].tolist()
        torch.testing.assert_close(scores[sample], alone[sample].sequences_scores, **TOLERANCE)
        assert tokens[sample, 0].tolist() != tokens[sample, 1].tolist()


def split(batch: dict) -> list[dict]:
    """Each sample of a left-padded batch alone and without padding."""
    parts, used = [], 0
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        images = int((ids == IMAGE_TOKEN).sum()) // TOKENS_PER_TILE
        ids = ids[mask][None]
        pictures = {"pixel_values": batch["pixel_values"][used : used + images]} if images else {}
        parts.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)} | pictures)
        used += images
    return parts


@pytest.mark.parametrize("name", ["hybrid-mlerp-2-stage", "hybrid-mean-3-stage", "no-image-in-a-sample"])
def test_report_tells_what_the_oracle_saw(name):
    model, batch = stock(name)
    fastmmoe.enable(model, fastmmoe.FastMMoEConfig(**CASES[name].config))
    generate(model, batch)  # the prefill's report outlives the decoding
    report = fastmmoe.report(model)
    prefills = [generation.prefill for generation in oracle(name)]
    vision = [int((ids == IMAGE_TOKEN).sum()) for ids in batch["input_ids"]]
    valid = batch["attention_mask"].sum(dim=1).tolist()
    assert list(report.n_vision) == vision
    assert list(report.n_text) == [n - n_vis for n, n_vis in zip(valid, vision, strict=True)]
    assert [list(row) for row in zip(*report.tokens_per_layer, strict=True)] == [
        list(prefill.tokens_per_layer) for prefill in prefills
    ]
    assert [stage.layer for stage in report.stages] == list(CASES[name].config["prune_layers"])
    for sample, prefill in enumerate(prefills):
        in_prompt = [stage.entering for stage in prefill.stages][0]  # positions of all vision tokens
        for got, want in zip(report.stages, prefill.stages, strict=True):
            counts = len(want.entering), len(want.kept), len(want.merged)
            assert (got.entering[sample], got.kept[sample], got.merged[sample]) == counts
            assert got.dropped[sample] == counts[0] - counts[1] - counts[2]
            members = {position for window in want.merged for position in window}
            fate = [0 if p in want.kept else 1 if p in members else 2 if p in want.entering else 3 for p in in_prompt]
            assert got.fate[sample].tolist() == fate


# nothing left behind, nothing changed where nothing is asked for


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_disable_restores_every_bit(attn_implementation):
    name = "hybrid-mlerp-3-stage"
    model, batch = stock(name, attn_implementation)
    before, ids = logits_of(model, batch), generate(model, batch).sequences
    config = fastmmoe.FastMMoEConfig(**CASES[name].config)
    fastmmoe.enable(model, config)
    during = logits_of(model, batch)
    generate(model, batch)
    fastmmoe.disable(model)
    assert (during[:, -1] - before[:, -1]).abs().max() > 0.1, "enabling had no effect"
    assert torch.equal(logits_of(model, batch), before)
    assert torch.equal(generate(model, batch).sequences, ids)

    with fastmmoe.enabled(model, config):
        assert torch.equal(logits_of(model, batch), during)
    assert torch.equal(logits_of(model, batch), before)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"vision_top_k": 4, "reduction_layer": 0},
        {"prune_layers": (1, 3)},
        {"prune_layers": (1,), "keep_ratios": (1.0,)},
    ],
    ids=str,
)
def test_settings_that_change_nothing_are_bit_identical(config, attn_implementation):
    model = tiny_internvl(attn_implementation=attn_implementation)
    batch = tiny_batch(model)
    want = generate(model, batch, output_logits=True)
    before = logits_of(model, batch)
    fastmmoe.enable(model, fastmmoe.FastMMoEConfig(**config))
    assert torch.equal(logits_of(model, batch), before)
    got = generate(model, batch, output_logits=True)
    assert torch.equal(got.sequences, want.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))


def test_text_only_input_is_bit_identical():
    model = tiny_internvl()
    batch = tiny_batch(model, images_per_sample=(0, 0), text=(6, 0, 6))
    assert "pixel_values" not in batch
    before = generate(model, batch, output_logits=True)
    fastmmoe.enable(model, fastmmoe.FastMMoEConfig(**CASES["hybrid-mlerp-2-stage"].config))
    after = generate(model, batch, output_logits=True)
    assert torch.equal(before.sequences, after.sequences)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))


def test_what_stands_in_the_padding_does_not_matter():
    name = "no-image-in-a-sample"
    model, batch = stock(name)
    batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], PAD_TOKEN + 77)
    fastmmoe.enable(model, fastmmoe.FastMMoEConfig(**CASES[name].config))
    assert_logits_match(logits_of(model, batch), batch, oracle(name))
