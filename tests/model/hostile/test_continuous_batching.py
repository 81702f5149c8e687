"""transformers' continuous batching (`generate_batch`) takes prompts of text: those are the stock model's."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import fastmmoe
from fastmmoe import FastMMoEConfig

from .. import tiny_families
from ..methods import skipping

TEXTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]]
BOTH = FastMMoEConfig(vision_top_k=2, reduction_layer=1, prune_layers=(1, 3), retention=0.5)
TOKENS = dict(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
FAMILIES = ("internvl_qwen3_moe", "qwen3_vl_moe")


@pytest.fixture(params=FAMILIES)
def built(request):
    model, inputs = tiny_families.FAMILIES[request.param]()
    yield model, inputs
    fastmmoe.disable(model)


def ask(model):
    """The new tokens of each text, and what went wrong."""
    # else the cache takes most of the machine's memory
    small = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    found = model.generate_batch(TEXTS, GenerationConfig(**TOKENS), small, warmup=False)
    return [(one.generated_tokens, one.error) for _, one in sorted(found.items())]


def alone(model):
    return [model.generate(torch.tensor([text]), **TOKENS)[0, len(text) :].tolist() for text in TEXTS]


def test_prompts_of_text_are_those_of_the_stock_model(built):
    model, inputs = built
    want = alone(model)
    with torch.no_grad():
        fastmmoe.enable(model, BOTH)
        reduced = model(**inputs).logits
        assert ask(model) == [(tokens, None) for tokens in want]
        # and a prompt with a picture is what it was
        torch.testing.assert_close(model(**inputs).logits, reduced, rtol=0, atol=0)


def test_a_method_that_reduces_text_is_refused(built):
    model, _ = built
    fastmmoe.enable(model, skipping(model.config.text_config.num_hidden_layers))
    for tokens, error in ask(model):
        assert not tokens and "continuous batching (generate_batch)" in error and "under MoDESConfig" in error
    fastmmoe.disable(model)
    assert ask(model) == [(tokens, None) for tokens in alone(model)]
