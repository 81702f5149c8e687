"""What a call of the model is: calls within calls, a text model that is called twice, modules that are gone past."""

import gc
import weakref

import pytest
import torch

import fastmmoe
from fastmmoe_kernels import VisionLayout

from .common import (
    alone,
    batch_of,
    close,
    config_of,
    enabled_logits,
    fresh,
    generate,
    in_one_row,
    layers_of,
    logits_of,
    stock_logits,
    vision_of,
    words,
)


@pytest.fixture
def model(family):
    return fresh(family)


def parent_of(model):
    return model.model


def text_of(model):
    return model.model.language_model


@pytest.mark.parametrize("where", ["vision", "layer", "parent"])
def test_a_call_within_a_call(model, family, config, where):
    """A user's hook asks the same model about something else."""
    inner, said = {}, words(family)
    modules = {"vision": model.model.vision_tower, "layer": text_of(model).layers[2], "parent": parent_of(model)}

    def hook(*_):
        if not inner:
            inner["running"] = True
            inner["text"] = logits_of(model, said)
            inner["image"] = logits_of(model, batch_of(family))

    fastmmoe.enable(model, config_of(config))
    handle = modules[where].register_forward_pre_hook(hook)
    assert torch.equal(logits_of(model, batch_of(family)), enabled_logits(family, config))
    handle.remove()
    assert torch.equal(inner["image"], enabled_logits(family, config))
    assert torch.equal(inner["text"], logits_of(fresh(family), said))


def test_another_config_within_a_call(model, family):
    seen = {}

    def hook(*_):
        if not seen:
            seen["running"] = True
            with fastmmoe.enabled(model, config_of("experts")):
                seen["block"] = logits_of(model, batch_of(family))
            fastmmoe.disable(model)
            seen["off"] = logits_of(model, batch_of(family))
            fastmmoe.enable(model, config_of("both"))

    fastmmoe.enable(model, config_of("both"))
    handle = text_of(model).layers[2].register_forward_pre_hook(hook)
    assert torch.equal(logits_of(model, batch_of(family)), enabled_logits(family, "both"))
    handle.remove()
    assert torch.equal(seen["block"], enabled_logits(family, "experts"))
    assert torch.equal(seen["off"], stock_logits(family))


def test_the_text_model_is_called_twice(model, family, config):
    """As a wrapper does that tries again."""
    fastmmoe.enable(model, config_of(config))
    text = text_of(model)
    forward, first = text.forward, []

    def twice(*args, **kwargs):
        first.append(forward(*args, **dict(kwargs, past_key_values=None, use_cache=False))[0])
        return forward(*args, **kwargs)

    text.forward = twice
    assert torch.equal(logits_of(model, batch_of(family)), enabled_logits(family, config))
    text.forward = forward
    with torch.no_grad():
        assert torch.equal(model.lm_head(first[0]), enabled_logits(family, config))


def test_a_multimodal_model_whose_forward_was_taken_off_is_an_error(model, family, config):
    fastmmoe.enable(model, config_of(config))
    del parent_of(model).forward
    with pytest.raises(RuntimeError, match="no effect"):
        logits_of(model, batch_of(family))
    fastmmoe.enable(model, config_of(config))
    fastmmoe.disable(model)
    assert torch.equal(logits_of(model, batch_of(family)), stock_logits(family))


@pytest.mark.parametrize("theirs", ["experts", "both", "prune"])
def test_models_that_share_layers(model, family, theirs):
    other = fresh(family)
    text_of(other).layers = text_of(model).layers
    fastmmoe.enable(model, config_of("both"))
    fastmmoe.enable(other, config_of(theirs))
    assert torch.equal(logits_of(model, batch_of(family)), enabled_logits(family, "both"))
    assert torch.equal(logits_of(other, batch_of(family)), enabled_logits(family, theirs))
    fastmmoe.disable(other)
    assert torch.equal(logits_of(model, batch_of(family)), enabled_logits(family, "both"))
    assert torch.equal(logits_of(other, batch_of(family)), stock_logits(family))


def test_a_container_of_two_models_is_refused(model, family):
    other = fresh(family)
    box = torch.nn.ModuleList([model, other])
    fastmmoe.enable(model, config_of("both"))
    for refused in (lambda: fastmmoe.enable(box, config_of("both")), lambda: fastmmoe.disable(box)):
        with pytest.raises(ValueError, match="2 supported models"):
            refused()
    assert torch.equal(logits_of(model, batch_of(family)), enabled_logits(family, "both"))


def test_an_enable_that_fails_half_way_leaves_nothing(model, family):
    """An attention module without a config: found out when most is on already."""
    attention = text_of(model).layers[3].self_attn
    config = vars(attention).pop("config")
    with pytest.raises(ValueError, match="layer 3's attention"):
        fastmmoe.enable(model, config_of("both"))
    attention.config = config
    assert torch.equal(logits_of(model, batch_of(family)), stock_logits(family))
    fastmmoe.enable(model, config_of("both"))
    assert torch.equal(logits_of(model, batch_of(family)), enabled_logits(family, "both"))
    fastmmoe.disable(model)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_on_a_prune_layers_moe_has_its_effect(model, family, when):
    moe = text_of(model).layers[1].mlp
    shapes = []

    def silence(module, args, output):
        shapes.append((tuple(args[0].shape), tuple(output.shape)))
        return output * 0

    if when == "before":
        moe.register_forward_hook(silence)
    fastmmoe.enable(model, config_of("prune"))
    if when == "after":
        moe.register_forward_hook(silence)
    got = logits_of(model, batch_of(family))
    assert shapes and all(given == made for given, made in shapes)
    # as if the experts' own weights were zero
    twin = fresh(family)
    for name, weight in text_of(twin).layers[1].mlp.named_parameters():
        if "down_proj" in name:
            weight.data.zero_()
    fastmmoe.enable(twin, config_of("prune"))
    torch.testing.assert_close(got, logits_of(twin, batch_of(family)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("part", ["gate", "experts"])
def test_a_replaced_forward_that_computes_something_else_is_refused(model, family, part):
    module = getattr(text_of(model).layers[3].mlp, part)
    forward = module.forward

    def changed(*args):
        output = forward(*args)
        # beside what the experts make of each choice, something for the token
        return (output[0], output[1] * 0.5, output[2]) if part == "gate" else output + 1.0

    module.forward = changed
    fastmmoe.enable(model, config_of("experts"))
    with pytest.raises(RuntimeError, match=part):
        logits_of(model, batch_of(family))
    module.forward = lambda *args: forward(*args)
    fastmmoe.enable(model, config_of("both"))
    assert torch.equal(logits_of(model, batch_of(family)), enabled_logits(family, "both"))


def test_a_replaced_forward_of_experts_that_makes_something_else_of_them(model, family):
    """It runs, on one row per token and expert."""
    experts, plain = text_of(model).layers[3].mlp.experts, fresh(family)
    text_of(plain).layers[3].mlp.experts.down_proj.data *= 0.5
    forward = experts.forward
    experts.forward = lambda *args: forward(*args) * 0.5
    fastmmoe.enable(model, config_of("experts"))
    fastmmoe.enable(plain, config_of("experts"))
    close(logits_of(model, batch_of(family)), logits_of(plain, batch_of(family)))


@pytest.mark.parametrize("scale", [1.0, 0.5], ids=["our experts", "its own experts"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["hook", "forward"])
def test_somebody_behind_the_gate_chooses_more_experts(model, family, wrapped, scale):
    """Theirs run, all of them: here stock's, in the only layer that would have had fewer."""
    last, plain = len(text_of(model).layers) - 1, fresh(family)
    for one in (model, plain):
        experts = text_of(one).layers[last].mlp.experts
        experts.forward = lambda *args, forward=experts.forward: forward(*args) * scale
    gate, stock_gate = text_of(model).layers[last].mlp.gate, text_of(plain).layers[last].mlp.gate
    config = config_of("experts", reduction_layer=last)
    fastmmoe.enable(model, config)
    valid = batch_of(family)["attention_mask"].bool()
    want = logits_of(plain, batch_of(family))[valid]
    assert (logits_of(model, batch_of(family))[valid] - want).abs().max() > 0.1
    if wrapped:
        ours = gate.forward
        gate.forward = lambda *args: (ours(*args), stock_gate(*args))[1]
    else:
        gate.register_forward_hook(lambda module, args, output: stock_gate(*args))
    close(logits_of(model, batch_of(family))[valid], want)


@pytest.mark.parametrize("scale", [1.0, 0.5], ids=["our experts", "its own experts"])
def test_a_moe_that_is_asked_about_more_tokens(model, family, scale):
    """Beside the forward's own it chooses for others, and experts run on them, as if nothing were enabled."""
    moe, plain = text_of(model).layers[3].mlp, text_of(fresh(family)).layers[3].mlp
    for one in (moe, plain):
        one.experts.forward = lambda *args, forward=one.experts.forward: forward(*args) * scale
    fastmmoe.enable(model, config_of("experts"))
    want = logits_of(model, batch_of(family))
    forward, seen = moe.forward, []

    def twice(hidden):
        output = forward(hidden)
        longer = torch.cat([hidden, hidden], 1)
        seen.append((longer, forward(longer)))
        return output

    moe.forward = twice
    assert torch.equal(logits_of(model, batch_of(family)), want)
    [(longer, got)] = seen
    with torch.no_grad():
        close(got, plain(longer))


def test_samples_that_only_their_positions_tell_apart(model, family, config):
    """transformers takes such a row for several samples where nothing is cached."""
    samples = alone(batch_of(family))
    row = in_one_row(samples)
    row.pop("attention_mask", None)
    fastmmoe.enable(model, config_of(config))
    got, end = logits_of(model, row, use_cache=False)[0], 0
    for sample in samples:
        end += sample["input_ids"].shape[1]
        close(got[end - 1], logits_of(model, sample)[0, -1])


def test_a_mask_of_pairs_within_a_fixed_layout_is_refused(model, family):
    batch = alone(batch_of(family))[0]
    n = batch["input_ids"].shape[1]
    fastmmoe.enable(model, config_of("both"))
    layout = VisionLayout.from_mask(vision_of(batch))
    batch["attention_mask"] = torch.ones(1, 1, n, n).tril().bool()
    with fastmmoe.fixed_layout(model, layout), pytest.raises(ValueError, match="attention_mask"):
        logits_of(model, batch)


@pytest.mark.parametrize("state", ["off", "on", "on-and-reported", "in-another-block"])
def test_a_model_is_freed_at_once(family, state):
    """As soon as a stock model is, whether it was enabled or still is; the next one may lie in its place."""
    for _ in range(3):
        model, stock = fresh(family), fresh(family)
        logits_of(fresh(family), batch_of(family))
        gc.collect()
        gc.disable()  # from here on: what `enable` leaves behind counts too
        fastmmoe.enable(model, config_of("both"))
        logits_of(model, batch_of(family))
        logits_of(stock, batch_of(family))
        if state == "off":
            fastmmoe.disable(model)
        elif state == "on-and-reported":
            fastmmoe.report(model)
        elif state == "in-another-block":
            with fastmmoe.enabled(model, config_of("experts")):
                generate(model, batch_of(family))
        alive = [[weakref.ref(module) for module in (one, text_of(one), layers_of(one)[2])] for one in (model, stock)]
        try:
            del model, stock
            assert [ref() is None for ref in alive[0]] == [ref() is None for ref in alive[1]] == [True] * 3
        finally:
            gc.enable()


def test_a_text_model_whose_multimodal_model_is_gone(family):
    """It is one by itself, until another multimodal model has it."""
    model, other = fresh(family), fresh(family)
    fastmmoe.enable(model, config_of("both"))
    text = text_of(model)
    del model
    gc.collect()
    for config in ("both", "experts"):
        with pytest.raises(ValueError, match="by itself"):
            fastmmoe.enable(text, config_of(config))
    other.model.language_model = text
    fastmmoe.enable(other, config_of("both"))
    assert torch.equal(logits_of(other, batch_of(family)), enabled_logits(family, "both"))
    fastmmoe.disable(other)
    assert torch.equal(logits_of(other, batch_of(family)), stock_logits(family))


def test_a_forward_whose_model_is_gone_says_so(family):
    model = fresh(family)
    fastmmoe.enable(model, config_of("both"))
    forward = model.forward
    del model
    gc.collect()
    with pytest.raises(ReferenceError, match="the model of this forward is gone"):
        forward(**batch_of(family))


class _Generator(torch.nn.Module):
    """A wrapper that says of itself what transformers' classes say, by a method of its own."""

    def __init__(self, model):
        super().__init__()
        self.inside = model
        self.eval()

    def can_generate(self):
        return True

    def forward(self, **inputs):
        return self.inside(**inputs)


def test_a_wrapper_that_can_generate(family):
    model = fresh(family)
    fastmmoe.enable(_Generator(model), config_of("both"))
    wrapper = _Generator(model)
    fastmmoe.enable(wrapper, config_of("both"))
    assert torch.equal(wrapper(**batch_of(family)).logits, enabled_logits(family, "both"))
    short = wrapper(**batch_of(family), logits_to_keep=1).logits
    assert short.shape[1] == 1
    close(short, enabled_logits(family, "both")[:, -1:])
    fastmmoe.disable(wrapper)
    assert torch.equal(wrapper(**batch_of(family)).logits, stock_logits(family))
