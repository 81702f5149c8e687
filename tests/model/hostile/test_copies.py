"""Copies of an enabled model are stock models, and say so once; the original stays as it is."""

import copy
import io
import pickle
import warnings

import pytest
import torch

import fastmmoe

from .common import assert_stock, batch_of, built, config_of, enabled_logits, fresh, layers_of, logits_of


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.fixture(params=COPIES)
def how(request):
    return COPIES[request.param]


@pytest.fixture
def model(family, how):
    """What transformers puts on an InternVL in its first forward cannot be pickled: that one must not have run."""
    return fresh(family) if how is copy.deepcopy else built(family)


def no_trace(model):
    """Attributes' types and hooks, by module: what `state_of` compares by identity cannot be equal for a copy."""
    return {
        name: (
            type(module),
            {key: type(value) for key, value in vars(module).items()},
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }


def test_a_copy_is_a_stock_model(model, family, config, how):
    batch, stock = batch_of(family), no_trace(how(model))
    fastmmoe.enable(model, config_of(config))
    if how is copy.deepcopy:
        logits_of(model, batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other = how(model)
    told = [warning for warning in caught if "copy" in str(warning.message)]
    assert len(told) == 1 and told[0].category is UserWarning
    assert no_trace(other) == stock
    with pytest.raises(RuntimeError, match="not enabled"):
        fastmmoe.report(other)
    assert_stock(other, family)
    # a model of its own
    fastmmoe.enable(other, config_of("both"))
    assert torch.equal(logits_of(other, batch), enabled_logits(family, "both"))
    fastmmoe.disable(other)
    assert_stock(other, family)
    # nothing of which the original noticed
    assert torch.equal(logits_of(model, batch), enabled_logits(family, config))
    fastmmoe.disable(model)
    assert_stock(model, family)


def test_a_copy_made_within_a_block(model, family, how):
    batch = batch_of(family)
    with fastmmoe.enabled(model, config_of("both")):
        with pytest.warns(UserWarning, match="copy"):
            other = how(model)
        assert torch.equal(logits_of(model, batch), enabled_logits(family, "both"))
        assert_stock(other, family)
    assert_stock(model, family)
    assert_stock(other, family)


def test_a_copy_of_a_stock_model_says_nothing(model, family, how):
    with fastmmoe.enabled(model, config_of("both")):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = how(model)
    assert_stock(other, family)


@pytest.mark.parametrize("how", [*COPIES], indirect=True)
def test_a_config_copied_from_a_prune_layer_is_a_plain_one(family, how):
    model = fresh(family)
    stock = layers_of(model)[1].self_attn.config
    fastmmoe.enable(model, config_of("both"))
    other = how(layers_of(model)[1].self_attn.config)
    assert type(other) is type(stock) and other.to_dict() == stock.to_dict()
    assert other._attn_implementation == "sdpa"
    # and is not tied to the model
    other.num_hidden_layers = 1
    assert layers_of(model)[1].self_attn.config.num_hidden_layers == 6
