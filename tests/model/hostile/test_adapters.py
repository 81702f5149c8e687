"""LoRA on the very parameters that FastMMoE reads: gates and experts, the adapter on, off and merged, in both orders.

The expectation is a model whose weights hold the adapter's values, enabled before anything ran on it.
"""

import pytest
import torch

import fastmmoe

from .common import batch_of, close, config_of, fresh, logits_of, same

pytestmark = pytest.mark.usefixtures("no_gradients")
peft = pytest.importorskip("peft")
PARAMETERS = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def adapted(model, parameters):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_parameters=list(parameters), init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def enabled_logits(model, config, batch):
    with fastmmoe.enabled(model, config):
        return logits_of(model, batch)


@pytest.fixture(params=[PARAMETERS[:1], PARAMETERS[1:], PARAMETERS], ids=["gate", "experts", "both"])
def parameters(request):
    return request.param


@pytest.fixture(params=["adapter-first", "enabled-first"])
def order(request):
    return request.param


def test_an_adapter_is_on_off_and_merged(family, config, parameters, order):
    batch, settings = batch_of(family), config_of(config)
    without = enabled_logits(fresh(family), settings, batch)
    plain = adapted(fresh(family), parameters).merge_and_unload()
    stock, want = logits_of(plain, batch), enabled_logits(plain, settings, batch)
    assert (want - without).abs().max() > 0.1, "the adapter has no effect"

    base = fresh(family)
    if order == "enabled-first":
        fastmmoe.enable(base, settings)
    model = adapted(base, parameters)
    if order == "adapter-first":
        fastmmoe.enable(model, settings)
    close(logits_of(model, batch), want)
    with model.disable_adapter():
        same(logits_of(model, batch), without)
    model.merge_adapter()
    close(logits_of(model, batch), want)
    model.unmerge_adapter()
    close(logits_of(model, batch), want)
    fastmmoe.disable(model)
    close(logits_of(model, batch), stock)
    fastmmoe.enable(base, settings)  # by its other name
    whole = model.merge_and_unload()
    close(logits_of(whole, batch), want)
    fastmmoe.disable(whole)
    close(logits_of(whole, batch), stock)
