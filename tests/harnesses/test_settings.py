"""Methods from the words of a command line."""

import pytest
from model.tiny import tiny_internvl

from fastmmoe.harnesses.settings import read_method
from fastmmoe.methods import FastMMoEConfig, FastVConfig, RandomConfig, SparseVLMConfig


@pytest.fixture(scope="module")
def model():
    return tiny_internvl()


def test_settings_alone_stand_in_place_of_the_presets(model):
    found = read_method(model, None, {"prune_layers": "[1,2]", "retention": 0.5, "keep_by": "redundancy"})
    assert found == FastMMoEConfig.preset(model, retention=0.5, prune_layers=(1, 2), keep_by="redundancy")
    assert read_method(model, "FastMMoE", {"vision_top_k": "null"}) == FastMMoEConfig.preset(model, vision_top_k=None)


def test_other_methods_by_their_names(model):
    assert read_method(model, "fastv", {"layer": 2, "retention": 0.5}) == FastVConfig(layer=2, retention=0.5)
    values = {"layers": "[1, 2]", "keep_ratios": "[0.5, 0.5]"}
    assert read_method(model, "SparseVLM", values) == SparseVLMConfig((1, 2), keep_ratios=(0.5, 0.5))
    random = {"prune_layers": "[1]", "retention": 0.5}
    assert read_method(model, "random", random) == RandomConfig(prune_layers=(1,), retention=0.5)


def test_nothing_is_the_dense_model(model):
    assert read_method(model, None, {}) is None and read_method(model, "dense", {}) is None


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("fast", {}, "method: expected one of dense, fastmmoe, fastv, .*, got 'fast'"),
        ("dense", {"retention": 0.5}, "retention: the dense model has no settings"),
        (None, {"retentoin": 0.5}, "retentoin: unknown, expected settings of fastmmoe: .*retention"),
        ("fastv", {"window": 3}, "window: unknown, expected settings of fastv: "),
        ("fastv", {"layer": "[1"}, "layer: expected"),
        (None, {"retention": 2}, "retention"),
        (None, {"retention": 0.5, "prune_layers": "[1,99]"}, "prune_layers"),
    ],
)
def test_what_is_none_is_refused_by_name(model, method, settings, says):
    with pytest.raises((TypeError, ValueError), match=says):
        read_method(model, method, settings)
