"""Accuracy: batched answers are those of `generate`, one question at a time; errors are those on paper."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

import fastmmoe
from fastmmoe import FastMMoEConfig
from fastmmoe.families.chat import build_inputs, end_tokens
from fastmmoe.methods import FastVConfig, SparseVLMConfig
from fastmmoe.study.accuracy import binomial_error, by_type, evaluate, paired_difference
from fastmmoe.study.answers import answer
from fastmmoe.study.methods import Method
from fastmmoe.study.questions import Example
from fastmmoe.study.study import session_of

CONFIGS = {
    "dense": None,
    "fewer experts": FastMMoEConfig(vision_top_k=2),
    "pruned": FastMMoEConfig(prune_layers=(1, 2), retention=0.3, merge_ratio=0.2, vision_top_k=2, reduction_layer=1),
    "fastv": FastVConfig(layer=2, retention=0.25),
    # as many tokens as the picture asks for
    "adaptive": SparseVLMConfig((1, 2), rank_scale=2.0),
}


@pytest.fixture(scope="module")
def session(settings):
    return session_of(settings)


def generated(session, example, config):
    """Token ids of an answer, by transformers' own generation."""
    inputs = build_inputs(session.model, session.processor, [example.open_image()], example.question)
    with fastmmoe.enabled(session.model, config) if config else nullcontext():
        tokens = session.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    (end,) = end_tokens(session.model, session.processor)
    tokens = tokens[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens[: tokens.index(end)] if end in tokens else tokens


def said(session, example, config):
    return session.processor.decode(generated(session, example, config), skip_special_tokens=True)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_answers_are_those_of_generate(session, config):
    examples, batches = session.questions("test")
    assert any(batch.attention_mask is not None for batch in batches), "no batch has padding"
    assert sorted(number for batch in batches for number in batch.numbers) == list(range(len(examples)))
    found = {}
    end = end_tokens(session.model, session.processor)
    for batch in batches:
        found |= dict(zip(batch.numbers, answer(session.model, batch, config, max_new_tokens=4, end=end), strict=True))
    assert [found[n] for n in range(len(examples))] == [generated(session, e, config) for e in examples]
    assert len({tuple(tokens) for tokens in found.values()}) > 2


@pytest.mark.parametrize("config", [CONFIGS["pruned"], CONFIGS["adaptive"]], ids=["pruned", "adaptive"])
def test_evaluate_counts_right_answers_and_flops(session, config):
    examples, batches = session.questions("test")
    right = [number % 3 != 0 for number in range(len(examples))]
    # questions whose answer is what the model says, or is not
    examples = [
        Example(e.image, e.question, said(session, e, config) if is_right else "no way", "ab"[number % 2])
        for number, (e, is_right) in enumerate(zip(examples, right, strict=True))
    ]
    row = evaluate(
        session.model, session.processor, examples, batches, Method("x", configs=(config,)), max_new_tokens=4
    )
    assert row["right"] == "".join("01"[is_right] for is_right in right)
    assert row["accuracy"] == pytest.approx(np.mean(right)) and row["n"] == len(examples)
    assert row["types"] == pytest.approx({"a": np.mean(right[::2]), "b": np.mean(right[1::2])})
    reports = []
    with fastmmoe.enabled(session.model, config):
        for example in examples:
            with torch.inference_mode():
                session.model(**build_inputs(session.model, session.processor, [example.image], example.question))
            reports.append(fastmmoe.report(session.model).flops)
    spent, dense = sum(r.reduced for r in reports), sum(r.dense for r in reports)
    assert row["flops"] == pytest.approx(spent / len(examples)) and row["flops_ratio"] == pytest.approx(spent / dense)


def test_batches_take_configs_in_turn(session):
    examples, batches = session.questions("test")
    one, other = CONFIGS["pruned"], CONFIGS["fastv"]
    rows = [
        evaluate(session.model, session.processor, examples, batches, Method("x", configs=c), max_new_tokens=1)
        for c in ((one,), (other,), (one, other))
    ]
    turns = [n for batch in batches[1::2] for n in batch.numbers]
    expected = [rows[1 if n in turns else 0]["right"][n] for n in range(len(examples))]
    assert list(rows[2]["right"]) == expected
    assert rows[0]["flops"] < rows[2]["flops"] < rows[1]["flops"]


def test_binomial_error_by_hand():
    assert binomial_error([True] * 3 + [False]) == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert binomial_error([True, True]) == 0.0


def test_paired_difference_by_hand():
    # differences 1, 0, -1, 1: mean 1/4, squared deviations 9/16, 1/16, 25/16, 9/16, over 3: 44/48
    difference, error = paired_difference([1, 1, 0, 1], [0, 1, 1, 0])
    assert difference == pytest.approx(0.25) and error == pytest.approx((44 / 48 / 4) ** 0.5)
    assert paired_difference([1, 0, 1], [1, 0, 1]) == (0.0, 0.0)


def test_by_type():
    assert by_type(np.array([True, False, True]), ["b", "a", "b"]) == {"b": 1.0, "a": 0.0}
    assert by_type(np.array([True]), [""]) == {}
