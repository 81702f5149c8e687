"""One model under several names: the whole, its parts, wrappers. There is one installation, whoever is asked."""

import pytest
import torch

import fastmmoe
from fastmmoe_kernels import VisionLayout

from .common import (
    assert_stock,
    batch_of,
    config_of,
    enabled_logits,
    fresh,
    logits_of,
    state_of,
    stock_logits,
    vision_of,
)


def inner(model):
    return model, {"model": model, "inner": model.model}


def adapted(model):
    """LoRA that adds nothing yet, so that the stock logits stay what they are."""
    peft = pytest.importorskip("peft")
    wrapper = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"])).eval()
    return model, {"peft": wrapper, "base": wrapper.base_model.model}


def compiled(model):
    """Never run: it is the wrapper that counts."""
    return model, {"compiled": torch.compile(model, backend="eager"), "model": model}


@pytest.fixture(params=[inner, adapted, compiled], ids=["inner", "peft", "compiled"])
def names(request, family):
    """(a model, two names of it)."""
    return request.param(fresh(family))


@pytest.fixture(params=["first-name-first", "second-name-first"])
def order(request):
    return slice(None, None, 1 if request.param == "first-name-first" else -1)


def everyone(model, names):
    return [model, model.model, model.model.language_model, *names.values()]


def test_the_later_config_counts_and_anyone_switches_it_off(names, order, family):
    model, names = names
    before, batch = state_of(model), batch_of(family)
    first, second = list(names.values())[order]
    for last in range(len(everyone(model, names))):
        fastmmoe.enable(first, config_of("experts"))
        fastmmoe.enable(second, config_of("both"))
        assert torch.equal(logits_of(model, batch), enabled_logits(family, "both"))
        told = [fastmmoe.report(name).to_dict() for name in everyone(model, names)]
        assert all(one == told[0] for one in told) and len(told[0]["stages"]) == 2
        fastmmoe.disable(everyone(model, names)[last])
        for name in everyone(model, names):
            with pytest.raises(RuntimeError, match="not enabled"):
                fastmmoe.report(name)
        assert torch.equal(logits_of(model, batch), stock_logits(family))
    assert_stock(model, family, before)


def test_blocks_within_one_another(names, order, family):
    model, names = names
    before, batch = state_of(model), batch_of(family)
    first, second = list(names.values())[order]
    with fastmmoe.enabled(first, config_of("experts")):
        with fastmmoe.enabled(second, config_of("both")):
            assert torch.equal(logits_of(model, batch), enabled_logits(family, "both"))
        assert torch.equal(logits_of(model, batch), enabled_logits(family, "experts"))
    assert_stock(model, family, before)


def test_a_refused_config_leaves_the_other_name_enabled(names, order, family):
    model, names = names
    first, second = list(names.values())[order]
    fastmmoe.enable(first, config_of("both"))
    with pytest.raises(ValueError, match="prune_layers"):
        fastmmoe.enable(second, config_of("both", prune_layers=(1, 99)))
    assert torch.equal(logits_of(model, batch_of(family)), enabled_logits(family, "both"))


def test_a_fixed_layout_by_another_name(names, order, family):
    model, names = names
    first, second = list(names.values())[order]
    batch = batch_of(family)
    fastmmoe.enable(first, config_of("both"))
    layout = VisionLayout.from_mask(vision_of(batch), batch["attention_mask"].bool())
    with fastmmoe.fixed_layout(second, layout):
        assert torch.equal(logits_of(model, batch), enabled_logits(family, "both"))


def test_the_inner_model_by_itself(family, config):
    """Its forward, with the whole enabled and the other way round."""
    batch = batch_of(family)
    model, other = fresh(family), fresh(family)
    with torch.no_grad():
        stock = model.model(**batch).last_hidden_state
        fastmmoe.enable(model, config_of(config))
        fastmmoe.enable(other.model, config_of(config))
        want = model.model(**batch).last_hidden_state
        assert torch.equal(other.model(**batch).last_hidden_state, want) and not torch.equal(want, stock)
        assert torch.equal(logits_of(other, batch), enabled_logits(family, config))
        for one in (model.model, other):
            fastmmoe.disable(one)
        assert torch.equal(model.model(**batch).last_hidden_state, stock)
        assert torch.equal(other.model(**batch).last_hidden_state, stock)
