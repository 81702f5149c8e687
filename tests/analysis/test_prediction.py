"""Calculated times of the study's rows: those of `prefill_time` by hand, for one prompt of median length."""

import pytest
import torch
from model.methods import skipping

import fastmmoe
from fastmmoe import FastMMoEConfig
from fastmmoe.cost.devices import DEVICES, Ceilings
from fastmmoe.families.chat import build_inputs
from fastmmoe.methods import FastVConfig, RandomConfig, SparseVLMConfig
from fastmmoe.scenes.tokenizer import VISION_TOKENS
from fastmmoe.study.methods import Method, dense
from fastmmoe.study.prompts import encode, make_batches, typical
from fastmmoe.study.study import session_of

CONFIGS = {
    "fewer experts": FastMMoEConfig(vision_top_k=2, reduction_layer=1),
    "pruned": FastMMoEConfig(prune_layers=(1, 2), retention=0.3, vision_top_k=2),
    "budget": FastMMoEConfig(expert_budget=4, reduction_layer=0),
    "fastv": FastVConfig(layer=2, retention=0.25),
    "sparsevlm": SparseVLMConfig(layers=(1, 2), keep_ratios=(0.5, 0.5)),
}
SKIPPING = skipping(5, prune_layers=(1, 3), retention=0.5)


@pytest.fixture
def known(monkeypatch):
    """The registry with a device on which only reading takes time: the others launch a model this small."""
    monkeypatch.setitem(DEVICES, "reader", Ceilings("reader", 1e30, 1e9, 0.0, "bfloat16", "hand"))
    return DEVICES


@pytest.fixture(scope="module")
def session(settings):
    return session_of(settings)


def median_length(session):
    examples, _ = session.questions("test")
    inputs = [build_inputs(session.model, session.processor, [e.open_image()], e.question) for e in examples]
    return sorted(one["input_ids"].shape[1] for one in inputs)[len(inputs) // 2]


def by_hand(session, config, **measured):
    n_text = median_length(session) - VISION_TOKENS
    times = {
        name: fastmmoe.prefill_time(session.model, n_text, VISION_TOKENS, config, name, **measured) for name in DEVICES
    }
    return {name: time.reduced / time.dense for name, time in times.items()}


def test_prompts_alone_are_those_that_were_padded(session):
    examples, batches = session.questions("test")
    assert any(batch.attention_mask is not None for batch in batches)
    alone = [one for batch in batches for one in batch.alone()]
    expected = make_batches(encode(session.model, session.processor, examples), 1)
    assert [one.numbers for one in alone] == [one.numbers for one in expected]
    for one, other in zip(alone, expected, strict=True):
        assert one.attention_mask is None and torch.equal(one.position_ids, other.position_ids)
        assert torch.equal(one.embeddings, other.embeddings)
        assert one.layout.lengths == other.layout.lengths == (one.embeddings.shape[1],)
        assert torch.equal(one.layout.vision_mask, other.layout.vision_mask)


def test_the_typical_prompt_is_of_median_length(session):
    batches = session.questions("test")[1]
    assert typical(batches).layout.lengths == (median_length(session),)
    assert {length for batch in batches for length in batch.layout.lengths} > {median_length(session)}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_row_has_the_time_that_is_calculated_by_hand(session, known, config):
    row = session.evaluate("test", Method("x", configs=(config,)))
    assert row["time_ratio_predicted"] == pytest.approx(by_hand(session, config), rel=1e-12)
    assert list(row["time_ratio_predicted"]) == list(known) and row["time_ratio_predicted"]["reader"] < 1


def test_the_dense_model_takes_its_own_time(session):
    assert session.predict("test", dense()) == dict.fromkeys(DEVICES, 1.0)


def test_draws_take_equally_long(session, known):
    draws = tuple(RandomConfig(seed=seed, prune_layers=(1,), retention=0.5) for seed in range(3))
    assert session.predict("test", Method("x", configs=draws)) == by_hand(session, draws[2])


def test_experts_skipped_by_need_take_no_time(session, known):
    """Pairs as the gates of the prompt chose them, from their outputs."""
    examples, batches = session.questions("test")
    example = examples[typical(batches).numbers[0]]
    inputs = build_inputs(session.model, session.processor, [example.open_image()], example.question)
    ids, handles = {}, []
    for number, layer in enumerate(session.model.model.language_model.layers):
        look = lambda module, args, output, number=number: ids.__setitem__(number, output[2])  # noqa: E731
        handles.append(layer.mlp.gate.register_forward_hook(look))
    with torch.inference_mode(), fastmmoe.enabled(session.model, SKIPPING):
        session.model(**inputs)
    for handle in handles:
        handle.remove()
    vision = session.model.config.image_token_id == inputs["input_ids"][0]
    first = int(vision.nonzero()[0])
    pairs = {}
    for number, chosen in ids.items():
        # vision tokens stand together, and fewer behind every stage
        n_vision = len(chosen) - int((~vision).sum())
        active = (chosen < 8).sum(1)
        of_vision = int(active[first : first + n_vision].sum())
        pairs[number] = int(active.sum()) - of_vision, of_vision
    row = session.evaluate("test", Method("x", configs=(SKIPPING,)))
    measured, bound = by_hand(session, SKIPPING, expert_pairs=pairs), by_hand(session, SKIPPING)
    assert row["time_ratio_predicted"] == pytest.approx(measured, rel=1e-12)
    assert measured["reader"] < 0.99 * bound["reader"]
