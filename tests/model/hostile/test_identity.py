"""`disable` takes off what is still FastMMoE's and nothing else: forwards of others stay, ours do not come back."""

import functools

import pytest
import torch

import fastmmoe

from .common import (
    CONFIGS,
    assert_stock,
    batch_of,
    config_of,
    enabled_logits,
    fresh,
    layers_of,
    logits_of,
    same,
    state_of,
)

PLACES = {
    "prune-layer": lambda model: layers_of(model)[3],
    "layer-behind": lambda model: layers_of(model)[2],
    "last-layer": lambda model: layers_of(model)[5],
    "gate": lambda model: layers_of(model)[3].mlp.gate,
    "experts": lambda model: layers_of(model)[3].mlp.experts,
    "attention": lambda model: layers_of(model)[3].self_attn,
    "multimodal-model": lambda model: model.model,
    "model": lambda model: model,
}


@pytest.fixture(params=PLACES)
def place(request):
    return PLACES[request.param]


@pytest.fixture(params=["prune-layer", "gate", "experts", "model"])
def some_place(request):
    return PLACES[request.param]


@pytest.fixture
def config():
    """The one that changes all of these places."""
    return "both"


def counted(forward):
    """A forward that counts its calls and is otherwise the one given."""

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        wrapper.calls += 1
        return forward(*args, **kwargs)

    wrapper.calls = 0
    return wrapper


def calls_during(wrapper, run):
    before = wrapper.calls
    run()
    return wrapper.calls - before


def test_a_forward_that_someone_wrapped_stays(family, config, place):
    model, batch = fresh(family), batch_of(family)
    fastmmoe.enable(model, config_of(config))
    module = place(model)
    module.forward = wrapper = counted(module.forward)
    same(logits_of(model, batch), enabled_logits(family, config))
    fastmmoe.disable(model)
    assert vars(module)["forward"] is wrapper
    assert calls_during(wrapper, lambda: assert_stock(model, family)) > 0
    # and once more: the wrapper stands in front of what the first time left
    fastmmoe.enable(model, config_of(config))
    same(logits_of(model, batch), enabled_logits(family, config))
    fastmmoe.disable(model)
    assert vars(module)["forward"] is wrapper
    assert calls_during(wrapper, lambda: assert_stock(model, family)) > 0


def test_a_forward_wrapped_before_stays(family, config, some_place):
    model = fresh(family)
    module = some_place(model)
    module.forward = wrapper = counted(module.forward)
    before = state_of(model)
    fastmmoe.enable(model, config_of(config))
    same(logits_of(model, batch_of(family)), enabled_logits(family, config))
    fastmmoe.disable(model)
    assert calls_during(wrapper, lambda: assert_stock(model, family, before)) > 0


def test_a_forward_saved_while_enabled_is_put_back_later(family, config, some_place):
    model, batch = fresh(family), batch_of(family)
    module = some_place(model)
    fastmmoe.enable(model, config_of(config))
    saved = module.forward
    fastmmoe.disable(model)
    module.forward = saved
    assert_stock(model, family)
    # nor is it in the way
    fastmmoe.enable(model, config_of(config))
    same(logits_of(model, batch), enabled_logits(family, config))
    fastmmoe.disable(model)
    assert_stock(model, family)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("how_many", ["one", "all"])
def test_a_forward_that_someone_deleted(family, config, how_many):
    model = fresh(family)
    before = state_of(model)
    fastmmoe.enable(model, config_of(config))
    patched = [module for module in model.modules() if "forward" in vars(module)]
    for module in patched[len(patched) // 2 :][:1] if how_many == "one" else patched:
        del module.forward
    fastmmoe.disable(model)
    assert_stock(model, family, before)
    fastmmoe.enable(model, config_of(config))
    assert torch.equal(logits_of(model, batch_of(family)), enabled_logits(family, config))


def test_hooks_of_others_stay(family, config, some_place):
    model = fresh(family)
    fastmmoe.enable(model, config_of(config))
    seen = []
    some_place(model).register_forward_hook(lambda *_: seen.append("behind"))
    some_place(model).register_forward_pre_hook(lambda *_: seen.append("in front"))
    assert torch.equal(logits_of(model, batch_of(family)), enabled_logits(family, config))
    fastmmoe.disable(model)
    seen.clear()
    logits_of(model, batch_of(family))
    assert seen == ["in front", "behind"]
    assert_stock(model, family)
