"""Samples behind one another in one row: right, or refused by name."""

from __future__ import annotations

import pytest
import torch

import fastmmoe
from fastmmoe import FastMMoEConfig

from ..families import LOOPS
from .families import ONE, PRUNING, TWO, batch_of, built, config_of, is_per_token, placed, prompt, text_of, tolerance

pytestmark = pytest.mark.usefixtures("no_gradients")

M_ROPE = ("qwen3_vl_moe", "qwen3_omni_moe_thinker", "glm4v_moe", "ernie4_5_vl_moe")
MIXED = {
    "qwen3_5_moe": "layers are of kind linear_attention",
    "lfm2_vl_lfm2_moe": "layers are of kind conv",
    "llama4": "layers are of kind chunked_attention",
    "minimax_m3_vl": "layers are of kind minimax_m3_sparse",
    "unlimited_ocr": "layers are of kind reference_sliding_attention",
    "dots3_note": "layers are of kind indexed_attention",
    "mistral_large4": "layers are of kind indexed_attention",
    "internvl_gpt_oss": "InternVL with gpt-oss mixes them",
}
PLAIN = [name for name in PRUNING if name not in M_ROPE and name not in MIXED]


def assert_each_is_as_alone(name, model, config, row, alone):
    ends = (row["cu_seq_lens_q"][1:] - 1).tolist()
    with fastmmoe.enabled(model, config):
        got = model(**row).logits[0]
        for end, sample in zip(ends, alone, strict=True):
            want = model(**placed(name, sample)).logits[0, -1]
            torch.testing.assert_close(got[end], want, rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("name", PLAIN)
def test_a_packed_batch(name):
    model, alone = built(name)[0], [prompt(name, ONE), prompt(name, TWO)]
    row = fastmmoe.pack_batch(batch_of(alone))
    assert_each_is_as_alone(name, model, config_of(name), row, alone)


@pytest.mark.parametrize("experts_only", [False, True], ids=["all", "experts"])
@pytest.mark.parametrize("name", M_ROPE)
def test_a_packed_batch_with_positions_in_time_height_and_width(name, experts_only):
    """`pack_batch` made text positions: images lost theirs, and some models mixed the samples, without an error."""
    model, alone = built(name)[0], [prompt(name, ONE), prompt(name, TWO)]
    config = FastMMoEConfig(vision_top_k=2, reduction_layer=1) if experts_only else config_of(name)
    batch, seen = batch_of(alone), {}
    handle = text_of(name, model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**batch)
    handle.remove()
    row = fastmmoe.pack_batch(batch | {"position_ids": seen["position_ids"]})
    assert row["position_ids"].shape == (4, *row["input_ids"].shape)
    assert_each_is_as_alone(name, model, config, row, alone)
    with fastmmoe.enabled(model, config), pytest.raises(ValueError, match="position_ids: expected .4, 1, T. with"):
        model(**fastmmoe.pack_batch(batch))


@pytest.mark.parametrize("name", MIXED)
def test_layers_that_mix_samples_are_refused(name):
    """Without flash attention gpt-oss sees one sequence: its pruned row was wrong, without an error."""
    model = built(name)[0]
    row = fastmmoe.pack_batch(batch_of([prompt(name, ONE), prompt(name, TWO)]))
    with fastmmoe.enabled(model, config_of(name)), pytest.raises(ValueError, match=MIXED[name]):
        model(**row)


@pytest.mark.parametrize("name", [*PLAIN, "qwen3_vl_moe", "qwen3_omni_moe_thinker"])
def test_a_row_whose_positions_begin_anew(name):
    model, alone = built(name)[0], [prompt(name, ONE), prompt(name, TWO)]
    lengths = [sample["input_ids"].shape[1] for sample in alone]
    row = {key: torch.cat([sample[key] for sample in alone], int(is_per_token(key))) for key in alone[0]}
    del row["attention_mask"]
    row["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    with fastmmoe.enabled(model, config_of(name)):
        got = model(**row, use_cache=False).logits[0]
        for end, length, sample in zip((lengths[0], sum(lengths)), lengths, alone, strict=True):
            want = model(**sample, position_ids=torch.arange(length)[None]).logits[0, -1]
            torch.testing.assert_close(got[end - 1], want, rtol=0, atol=tolerance(name))


def test_positions_of_a_model_that_does_not_look_at_them_are_one_sample():
    """As in the stock model: gpt-oss makes its masks without position ids."""
    name = "internvl_gpt_oss"
    model, inputs = built(name)[0], prompt(name, TWO)
    assert LOOPS[name].prune_layers
    n = inputs.pop("attention_mask").shape[1]
    anew = torch.cat((torch.arange(20), torch.arange(n - 20)))[None]
    with fastmmoe.enabled(model, config_of(name)):
        want = model(**inputs, position_ids=anew).logits
        got = model(**inputs, position_ids=anew, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_a_packed_batch_of_a_model_that_makes_masks_of_the_whole_row():
    """The error names that, and no mask, which the caller did not give."""
    row = fastmmoe.pack_batch(batch_of([prompt("gemma4", ONE), prompt("gemma4", TWO)]))
    model = built("gemma4")[0]
    with fastmmoe.enabled(model, config_of("gemma4")), pytest.raises(ValueError, match="cu_seq_lens_q: .* Gemma-4"):
        model(**row)
