"""Every family on the caches that users give `generate`, over turns, and beyond the windows of its layers."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import fastmmoe

from .. import tiny_families
from ..families import LOOPS
from ..test_parity_families import extended
from .families import (
    FAMILIES,
    ONE,
    PRUNING,
    TWO,
    assert_decodes_as_the_oracle,
    batch_of,
    built,
    config_of,
    generate,
    is_per_token,
    loop_of,
    placed,
    prompt,
    text_of,
    tolerance,
)

# the stock model's own static cache fails
STATIC = [name for name in FAMILIES if name != "inkling2"]
# the stock model's padded batch is not what its samples are alone, in the prefill or behind a window's end
PADDED = [name for name in STATIC if LOOPS[name].batch and name != "unlimited_ocr"]
# the stock model refuses candidates, or fails on them
NO_CANDIDATES = ("qwen3_5_moe", "ernie4_5_vl_moe")
REPEATING = ((5, 6, 31, 7, 8), (7, 8, 28), (5, 6, 31, 7, 8, 28, 5, 6))
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.mark.parametrize("name", PADDED)
def test_a_padded_batch_on_a_static_cache_decodes_as_its_samples_alone(name):
    """Sliding layers behind a prune layer took one mask for all layers; no full-attention layer was a KeyError."""
    model, _ = built(name)
    alone = [prompt(name, ONE), prompt(name, TWO)]
    with fastmmoe.enabled(model, config_of(name)):
        batch = generate(model, batch_of(alone), 5, cache_implementation="static")
        want = [generate(model, sample, 5) for sample in alone]
    for row, single in enumerate(want):
        for got, expected in zip(batch.logits, single.logits, strict=True):
            torch.testing.assert_close(got[row], expected[0], rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("cache", ["default", "static"])
def test_unlimited_ocr_decodes_beyond_its_window(cache):
    """`generate` tells every layer the whole prompt's length; a pruned layer kept answers in the missing places."""
    name = "unlimited_ocr"
    options = {"cache_implementation": "static"} if cache == "static" else {}
    assert_decodes_as_the_oracle(name, built(name)[0], config_of(name), prompt(name, TWO), 14, **options)


def test_unlimited_ocr_in_a_turn_longer_than_its_window():
    name = "unlimited_ocr"
    model, config, inputs, turn = built(name)[0], config_of(name), prompt(name, TWO), list(range(40, 52))
    n = inputs["input_ids"].shape[1]
    with fastmmoe.enabled(model, config):
        first = generate(model, inputs, 4)
        ids = torch.cat((first.sequences, torch.tensor([turn])), 1)
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = generate(model, asked, 1, past_key_values=first.past_key_values)
    want = loop_of(name, model, config, extended(inputs, ids[:, n:]), [n, 1, 1, 1, 1 + len(turn)])
    torch.testing.assert_close(second.logits[0][0], want.logits[-1][-1], rtol=0, atol=1e-3)


def test_unlimited_ocr_on_a_cache_that_makes_its_layers_one_by_one():
    """The mask asked for a layer that was not there yet: IndexError."""
    model, _ = built("unlimited_ocr")
    inputs = prompt("unlimited_ocr", TWO)
    with fastmmoe.enabled(model, config_of("unlimited_ocr")):
        want = generate(model, inputs, 4)
        got = generate(model, inputs, 4, past_key_values=DynamicCache())
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize("cache", ["default", "static"])
@pytest.mark.parametrize(
    ("name", "option", "width"), [("llama4", "attention_chunk_size", 8), ("internvl_gpt_oss", "sliding_window", 4)]
)
def test_windows_and_chunks_shorter_than_the_prompt(name, option, width, cache):
    model, _ = tiny_families.FAMILIES[name]()
    text = text_of(name, model)
    setattr(text.config, option, width)
    for layer in text.layers:
        if getattr(layer.self_attn, option, None) is not None:
            setattr(layer.self_attn, option, width)
    options = {"cache_implementation": "static"} if cache == "static" else {}
    assert_decodes_as_the_oracle(name, model, config_of(name), prompt(name, TWO), 8, **options)


@pytest.mark.parametrize("name", [name for name in PRUNING if name != "unlimited_ocr"])
def test_a_second_turn_with_an_image_prunes_it_too(name):
    model, _ = built(name)
    config, first, second = config_of(name), prompt(name, ONE), prompt(name, ((17, 4), (27, 28, 29)), 2)
    n = first["input_ids"].shape[1]
    whole = {key: torch.cat((first[key], second[key]), 1 if is_per_token(key) else 0) for key in first}
    seen = {}
    handle = text_of(name, model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**whole)
    handle.remove()
    positions = seen.get("position_ids")
    positions = whole["attention_mask"].cumsum(1) - 1 if positions is None else positions
    with fastmmoe.enabled(model, config):
        prefill = model(**first, position_ids=positions[..., :n], use_cache=True)
        turn = second | {"attention_mask": whole["attention_mask"], "position_ids": positions[..., n:]}
        got = model(**turn, past_key_values=prefill.past_key_values).logits[0]
    want = loop_of(name, model, config, whole, [n, whole["input_ids"].shape[1] - n])
    kept = torch.tensor(want.kept[1]) - n
    assert len(kept) < second["input_ids"].shape[1]
    torch.testing.assert_close(got[kept], want.logits[1], rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "internvl_gpt_oss", "qwen3_5_moe", "ernie4_5_vl_moe"])
def test_beams_of_a_batch_are_those_of_its_samples_alone(name):
    model, _ = built(name)
    alone = [prompt(name, ONE), prompt(name, TWO)]
    options = dict(do_sample=False, num_beams=3, num_return_sequences=2, min_new_tokens=4, max_new_tokens=4,
                   return_dict_in_generate=True, output_scores=True)  # fmt: skip
    with fastmmoe.enabled(model, config_of(name)):
        batch = model.generate(**batch_of(alone), **options)
        for row, sample in enumerate(alone):
            single = model.generate(**sample, **options)
            rows = slice(2 * row, 2 * row + 2)
            assert torch.equal(batch.sequences[rows, -4:], single.sequences[:, -4:])
            torch.testing.assert_close(batch.sequences_scores[rows], single.sequences_scores, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "minimax_m3_vl", "mistral_large4", "mistral3_mistral4", "llama4"])
def test_a_cropped_cache_goes_on_as_if_nothing_had_been_there(name):
    model, _ = built(name)
    inputs = prompt(name, ((5, 6), (17,), (27, 28, 29, 30)))

    def step(cache, ids):
        asked = {key: value for key, value in extended(inputs, torch.tensor([ids])).items() if is_per_token(key)}
        return generate(model, asked, 1, past_key_values=cache)

    with fastmmoe.enabled(model, config_of(name)):
        want = step(model(**placed(name, inputs), use_cache=True).past_key_values, [41]).logits[0]
        cache = step(model(**placed(name, inputs), use_cache=True).past_key_values, [51, 52]).past_key_values
        cache.crop(-2)
        torch.testing.assert_close(step(cache, [41]).logits[0], want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in PRUNING if name not in NO_CANDIDATES])
@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_candidates_do_not_ask(name, how):
    """Where the model proposes its own next tokens, or takes them out of the prompt: they are not the prompt's last."""
    model, inputs = built(name)[0], prompt(name, REPEATING)
    options = {"assistant_model": model} if how == "assistant" else {"prompt_lookup_num_tokens": 3}
    want = [list(generate(model, inputs, 8, **one).sequences[0]) for one in ({}, options)]
    assert want[0] == want[1]
    with fastmmoe.enabled(model, config_of(name)):
        plain, got = (list(generate(model, inputs, 8, **one).sequences[0]) for one in ({}, options))
    assert got == plain
