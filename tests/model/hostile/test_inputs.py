"""Prefills in another form: embeddings that hold the pictures already, attention in a sliding window."""

import warnings

import pytest
import torch

import fastmmoe
from fastmmoe.prefill.cache import CACHE, cache_in
from fastmmoe_kernels import VisionLayout

from ..tiny import tiny_batch, tiny_internvl
from .common import (
    CONFIGS,
    batch_of,
    close,
    config_of,
    enabled_logits,
    fewer_experts_by_hand,
    fresh,
    generate,
    logits_of,
    stock_logits,
    vision_of,
    words,
)

# ------------------------------------------------------------------------------------------------ merged embeddings


def merged(family):
    """The prompt of `batch_of` as embeddings, pictures in their places: what the text model gets."""
    seen = {}
    model = fresh(family)
    text = model.model.language_model
    text.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    logits_of(model, batch_of(family))
    return {"inputs_embeds": seen["inputs_embeds"], "attention_mask": batch_of(family)["attention_mask"]}


@pytest.mark.parametrize("name", ["both", "prune"])
@pytest.mark.parametrize("token", ["known", "beyond-the-table"])
def test_embeddings_with_pictures_in_them_run_stock_and_say_so(family, name, token):
    model, batch = fresh(family), merged(family)
    if token == "beyond-the-table":
        model.config.image_token_id = 1000
    fastmmoe.enable(model, config_of(name))
    with pytest.warns(UserWarning, match="inputs_embeds"):
        got = logits_of(model, batch)
    assert torch.equal(got, stock_logits(family))


def test_embeddings_of_text_alone_say_nothing_of_pictures(family):
    """A decode step on embeddings, and embeddings beside their pictures: nothing is missing there."""
    model, batch = fresh(family), batch_of(family)
    fastmmoe.enable(model, config_of("both"))
    embeds = {**batch, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    del embeds["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            out = model(**embeds, use_cache=True)
            assert torch.equal(out.logits, enabled_logits(family, "both"))
            mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
            token = model.get_input_embeddings()(torch.tensor([[5], [7]]))
            model(inputs_embeds=token, attention_mask=mask, use_cache=True, **{CACHE: cache_in(out)})
        generate(model, words(family))
        generate(model, batch)


def test_embeddings_within_a_fixed_layout_are_pruned(family, config):
    model, batch = fresh(family), merged(family)
    fastmmoe.enable(model, config_of(config))
    layout = VisionLayout.from_mask(vision_of(batch_of(family)), batch["attention_mask"].bool())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastmmoe")  # transformers may have its own to say
        with fastmmoe.fixed_layout(model, layout):
            got = logits_of(model, batch)
    assert torch.equal(got, enabled_logits(family, config))
    assert len(fastmmoe.report(model).stages) == len(CONFIGS[config].get("prune_layers", ()))


# ------------------------------------------------------------------------------------------------ sliding windows


@pytest.mark.parametrize("window", [8, 400], ids=["narrow", "wider-than-the-prompt"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_fewer_experts_under_a_sliding_window(window, attention):
    """Which experts a token takes is no matter of who sees whom."""
    model = tiny_internvl(attn_implementation=attention, use_sliding_window=True, sliding_window=window)
    batch = tiny_batch(model, (1, 2))
    valid = batch["attention_mask"].bool()
    stock, tokens = logits_of(model, batch), generate(model, batch)
    with fewer_experts_by_hand(model, vision_of(batch), "experts"):
        want, continued = logits_of(model, batch), generate(model, batch)
    fastmmoe.enable(model, config_of("experts"))
    close(logits_of(model, batch)[valid], want[valid])
    assert torch.equal(generate(model, batch), continued)
    fastmmoe.disable(model)
    assert torch.equal(logits_of(model, batch), stock) and torch.equal(generate(model, batch), tokens)


@pytest.mark.parametrize("name", ["both", "prune"])
def test_pruning_under_a_sliding_window_is_refused(name):
    model = tiny_internvl(use_sliding_window=True, sliding_window=8)
    batch = tiny_batch(model, (1, 2))
    stock = logits_of(model, batch)
    with pytest.raises(ValueError, match="sliding"):
        fastmmoe.enable(model, config_of(name))
    assert torch.equal(logits_of(model, batch), stock)
