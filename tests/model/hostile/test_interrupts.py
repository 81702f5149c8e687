"""A forward that Ctrl-C, an exit or an error ends: the next one finds nothing of it, and nothing holds on to it."""

import gc
import weakref
from functools import cache

import pytest
import torch
from transformers import DynamicCache

import fastmmoe

from .common import (
    assert_stock,
    batch_of,
    config_of,
    fresh,
    layers_of,
    logits_of,
    words,
)

PLACES = {
    "vision-tower": lambda model: model.model.vision_tower,
    "prune-layer-attention": lambda model: layers_of(model)[3].self_attn,
    "prune-layer-norm": lambda model: layers_of(model)[1].post_attention_layernorm,
    "prune-layer-gate": lambda model: layers_of(model)[3].mlp.gate,
    "experts": lambda model: layers_of(model)[2].mlp.experts,
    "last-layer": lambda model: layers_of(model)[5],
    "lm-head": lambda model: model.lm_head,
}
CASES = [(place, KeyboardInterrupt) for place in PLACES]
CASES += [("experts", SystemExit), ("experts", RuntimeError)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[1].__name__}-{case[0]}")
def case(request):
    """(the module during which the forward ends, with what)."""
    place, exception = request.param
    return PLACES[place], exception


def interrupt(model, module, exception, batch):
    """A forward that ends when `module` has run; a weak reference to its cache."""

    def stop(*_):
        raise exception("stop here")

    handle = module.register_forward_hook(stop)
    kv = DynamicCache(config=model.model.language_model.config)
    try:
        # the token that asks is then not the last one, which is more to forget
        logits_of(model, batch, past_key_values=kv, use_cache=True, logits_to_keep=4)
    except exception as error:
        assert "stop here" in str(error)
    else:
        raise AssertionError("the module did not run")
    finally:
        handle.remove()
    return weakref.ref(kv)


@torch.no_grad()
def by_hand(model, kind, family):
    """One of the calls that may come next."""
    batch, text = batch_of(family), model.model.language_model
    if kind == "model":
        return model(**batch).logits
    if kind == "inner-model":
        return model.model(**batch).last_hidden_state
    if kind == "text":
        return model(**words(family)).logits
    embeds = text.embed_tokens(batch["input_ids"][1:])
    tables = text.rotary_emb(embeds, torch.arange(embeds.shape[1])[None])
    return layers_of(model)[3](embeds, position_embeddings=tables, attention_mask=None)


NEXT = ["model", "inner-model", "text", "layer"]


@cache
def expected(family):
    model = fresh(family)
    fastmmoe.enable(model, config_of("both"))
    return {kind: by_hand(model, kind, family) for kind in NEXT}


def test_the_next_forward_is_a_fresh_models(family, case):
    place, exception = case
    model = fresh(family)
    fastmmoe.enable(model, config_of("both"))
    for kind in NEXT:
        interrupt(model, place(model), exception, batch_of(family))
        assert torch.equal(by_hand(model, kind, family), expected(family)[kind]), kind
    interrupt(model, place(model), exception, batch_of(family))
    fastmmoe.disable(model)
    assert_stock(model, family)


def test_an_interrupted_forward_keeps_nothing(family, case):
    place, exception = case
    model = fresh(family)
    fastmmoe.enable(model, config_of("both"))
    kv = interrupt(model, place(model), exception, batch_of(family))
    if kv() is not None:  # takes a while
        gc.collect()
    assert kv() is None


@pytest.mark.parametrize("exception", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_block(family, exception):
    model = fresh(family)
    with pytest.raises(exception), fastmmoe.enabled(model, config_of("both")):
        raise exception("stop here")
    assert_stock(model, family)


@pytest.mark.parametrize("exception", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_decode_step(family, exception):
    """The cache that it was to extend is still the caller's, and still good for another try."""
    model, batch = fresh(family), batch_of(family)
    fastmmoe.enable(model, config_of("both"))
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    token = {"input_ids": torch.tensor([[5], [7]]), "attention_mask": mask}

    def step(kv):
        return logits_of(model, token, past_key_values=kv, use_cache=True)

    with torch.no_grad():
        want = step(model(**batch, use_cache=True).past_key_values)
        kv = model(**batch, use_cache=True).past_key_values

    def stop(*_):
        raise exception

    handle = layers_of(model)[0].register_forward_pre_hook(stop)
    with pytest.raises(exception):
        step(kv)
    handle.remove()
    assert torch.equal(step(kv), want)
