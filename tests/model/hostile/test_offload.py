"""Weights that accelerate keeps elsewhere: its hooks may go on before or after ours, and come off before or after."""

import pytest
import torch

import fastmmoe

from .common import CONFIGS, batch_of, config_of, enabled_logits, fresh, generate, logits_of, same, stock_logits

accelerate = pytest.importorskip("accelerate")
remove_hooks = accelerate.hooks.remove_hook_from_submodules


# reading from disk takes longer: one config
CASES = [("cpu", name) for name in CONFIGS] + [("disk", "both")]


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    return request.param


@pytest.fixture
def config(case):
    return case[1]


@pytest.fixture
def offload(case, tmp_path):
    """Keep a model's weights elsewhere, and load each module's when it runs."""
    if case[0] == "cpu":
        return lambda model: accelerate.cpu_offload(model, execution_device="cpu")
    return lambda model: accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")


@pytest.fixture(params=["offloaded-first", "enabled-first"])
def first(request):
    return request.param


def both(family, config, offload, first):
    model = fresh(family)
    if first == "offloaded-first":
        offload(model)
    fastmmoe.enable(model, config_of(config))
    if first == "enabled-first":
        offload(model)
    assert layer_weight(model).device.type == "meta"
    return model


def layer_weight(model):
    return model.model.language_model.layers[3].self_attn.q_proj.weight


def test_an_offloaded_model(family, config, offload, first):
    model, batch = both(family, config, offload, first), batch_of(family)
    same(logits_of(model, batch), enabled_logits(family, config))
    assert len(fastmmoe.report(model).stages) == 2 * (config != "experts")
    fastmmoe.enable(model, config_of(config))
    same(logits_of(model, batch), enabled_logits(family, config))
    # disabled, and then all of it in memory again
    fastmmoe.disable(model)
    assert torch.equal(logits_of(model, batch), stock_logits(family))
    remove_hooks(model)
    assert layer_weight(model).device.type == "cpu"
    assert torch.equal(logits_of(model, batch), stock_logits(family))


def test_hooks_of_accelerate_come_off_first(family, config, offload, first):
    model, batch = both(family, config, offload, first), batch_of(family)
    remove_hooks(model)
    same(logits_of(model, batch), enabled_logits(family, config))
    fastmmoe.disable(model)
    assert torch.equal(logits_of(model, batch), stock_logits(family))
    # and no part of either is left: accelerate puts forwards back on the instances
    left = {name: vars(module).get("forward") for name, module in model.named_modules()}
    for name, module in model.named_modules():
        assert left[name] is None or left[name].__self__ is module, name
        assert not hasattr(module, "_old_forward"), name


@pytest.mark.parametrize("config", ["both", "experts"])
def test_generate_with_parts_on_disk(family, config, tmp_path):
    """As `device_map="auto"` does where memory ends: some layers stay, the others are read from disk."""
    stock, model = fresh(family), fresh(family)
    with fastmmoe.enabled(stock, config_of(config)):
        want = generate(stock, batch_of(family))
    places = {
        name: "disk" if ".layers." in name and name[-1] in "135" else "cpu"
        for name in (".".join(parameter.split(".")[:4]) for parameter in model.state_dict())
    }
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert layer_weight(model).device.type == "meta"
    fastmmoe.enable(model, config_of(config))
    assert torch.equal(generate(model, batch_of(family)), want)
    fastmmoe.disable(model)
    assert torch.equal(generate(model, batch_of(family)), generate(stock, batch_of(family)))
