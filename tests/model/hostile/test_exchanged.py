"""Modules exchanged after `enable`: an error that names what, never NaN or another result; enabling again helps."""

import copy
import re

import pytest
import torch

import fastmmoe

from .common import (
    assert_stock,
    batch_of,
    config_of,
    enabled_logits,
    fresh,
    layers_of,
    logits_of,
    stock_logits,
    words,
)


@pytest.fixture(autouse=True)
def filled_memory():
    """What nobody wrote reads as NaN, in torch's own kernels too."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def exchange_experts(layers, stock):
    layers[3].mlp.experts = stock[3].mlp.experts


def exchange_last_experts(layers, stock):
    layers[5].mlp.experts = stock[5].mlp.experts


def exchange_gate(layers, stock):
    layers[3].mlp.gate = stock[3].mlp.gate


def exchange_moe(layers, stock):
    layers[3].mlp = stock[3].mlp


def exchange_prune_layer(layers, stock):
    layers[3] = stock[3]


def exchange_layer_between(layers, stock):
    layers[2] = stock[2]


def exchange_last_layer(layers, stock):
    layers[5] = stock[5]


CASES = [
    (exchange_experts, "experts", ("both", "experts")),
    (exchange_last_experts, "experts", ("both", "experts")),
    (exchange_gate, "gate", ("both", "experts")),
    (exchange_moe, "experts|gate|layer", ("both", "prune", "experts")),
    (exchange_prune_layer, "layer", ("both", "prune", "experts")),
    (exchange_layer_between, "layer", ("both", "prune", "experts")),
    (exchange_last_layer, "layer", ("both", "prune", "experts")),
]


@pytest.mark.parametrize(
    ("exchange", "message", "name"),
    [(exchange, message, name) for exchange, message, names in CASES for name in names],
    ids=[f"{exchange.__name__}-{name}" for exchange, _, names in CASES for name in names],
)
def test_an_exchanged_module_is_an_error(family, exchange, message, name):
    model = fresh(family)
    stock = copy.deepcopy(layers_of(model))
    batch = batch_of(family)
    fastmmoe.enable(model, config_of(name))
    exchange(layers_of(model), stock)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(RuntimeError, match=message):
            model(**batch)
    # text alone has nothing to reduce
    try:
        got = logits_of(model, words(family))
    except RuntimeError as error:
        assert re.search(message, str(error))
    else:
        assert torch.equal(got, logits_of(fresh(family), words(family)))
    fastmmoe.enable(model, config_of(name))
    assert torch.equal(logits_of(model, batch), enabled_logits(family, name))
    fastmmoe.disable(model)
    assert_stock(model, family)


@pytest.mark.parametrize("exchange", [exchange_experts, exchange_gate])
def test_what_pruning_alone_does_not_need(family, exchange):
    """Right, or an error: pruning reads the gate of its own layer and leaves experts alone."""
    model = fresh(family)
    stock = copy.deepcopy(layers_of(model))
    fastmmoe.enable(model, config_of("prune"))
    exchange(layers_of(model), stock)
    try:
        got = logits_of(model, batch_of(family))
    except RuntimeError as error:
        assert "gate" in str(error) or "experts" in str(error)
    else:
        assert torch.equal(got, enabled_logits(family, "prune"))


def test_a_layer_less_is_an_error(family, config):
    model, batch = fresh(family), batch_of(family)
    shorter = fresh(family)
    shorter.model.language_model.layers = layers_of(shorter)[:-1]
    stock = logits_of(shorter, batch)
    fastmmoe.enable(shorter, config_of(config))
    want = logits_of(shorter, batch)

    fastmmoe.enable(model, config_of(config))
    model.model.language_model.layers = layers_of(model)[:-1]
    with torch.no_grad(), pytest.raises(RuntimeError, match="layer"):
        model(**batch)
    fastmmoe.enable(model, config_of(config))
    assert torch.equal(logits_of(model, batch), want)
    fastmmoe.disable(model)
    assert torch.equal(logits_of(model, batch), stock)


def test_what_was_taken_out_is_stock_again(family, config):
    """After `disable`, the old layer too: it may live on elsewhere."""
    model = fresh(family)
    old, new = layers_of(model)[3], copy.deepcopy(layers_of(model)[3])
    fastmmoe.enable(model, config_of(config))
    layers_of(model)[3] = new
    fastmmoe.disable(model)
    assert_stock(model, family)
    layers_of(model)[3] = old
    assert_stock(model, family)


def test_weights_that_change_are_no_exchange(family, config):
    """The same modules with other weights of the same values: nothing to object to."""
    model = fresh(family)
    fastmmoe.enable(model, config_of(config))
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert torch.equal(logits_of(model, batch_of(family)), enabled_logits(family, config))
    fastmmoe.disable(model)
    assert torch.equal(logits_of(model, batch_of(family)), stock_logits(family))
