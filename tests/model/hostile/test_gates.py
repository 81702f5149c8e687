"""Gates that are more than a weight: wrapped, parametrized, adapted, of a class of their own, with a bias."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastmmoe

from .. import naive, naive_deepseek
from .common import (
    CONFIGS,
    batch_of,
    close,
    config_of,
    fewer_experts_by_hand,
    fresh,
    layers_of,
    logits_of,
    same,
    vision_of,
)


def moe_layers(model):
    return [layer for layer in layers_of(model) if hasattr(layer.mlp, "gate")]


def noise(*shape, scale=0.1, seed=0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- each changes a gate, and returns the weight it equals


class Wrapper(nn.Module):
    """As adapter libraries do: holds the gate, answers for its attributes, `weight` too, and computes with another."""

    def __init__(self, gate, delta):
        super().__init__()
        self.base = gate
        self.delta = nn.Parameter(delta)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, hidden):
        return torch.func.functional_call(self.base, {"weight": self.base.weight + self.delta}, (hidden,))


class Plus(nn.Module):
    def __init__(self, delta):
        super().__init__()
        self.delta = nn.Parameter(delta)

    def forward(self, weight):
        return weight + self.delta


def wrapped(moe):
    weight = moe.gate.weight.detach()
    moe.gate = Wrapper(moe.gate, noise(*weight.shape))
    return weight + moe.gate.delta.detach()


def parametrized(moe):
    parametrize.register_parametrization(moe.gate, "weight", Plus(noise(*moe.gate.weight.shape)))
    return moe.gate.weight.detach()


def with_a_child(moe):
    """The family's own class and weight, and a module inside that takes part."""

    class Turned(type(moe.gate)):
        def forward(self, hidden):
            return super().forward(self.turn(hidden))

    moe.gate.__class__ = Turned
    width = moe.gate.weight.shape[1]
    moe.gate.turn = nn.Linear(width, width, bias=False)
    moe.gate.turn.weight.data = torch.eye(width) + noise(width, width, scale=0.02)
    return moe.gate.weight.detach() @ moe.gate.turn.weight.detach()


def of_a_class_of_its_own(moe):
    """Nothing but the class tells."""

    class Scaled(type(moe.gate)):
        def forward(self, hidden):
            return super().forward(1.5 * hidden)

    moe.gate.__class__ = Scaled
    return 1.5 * moe.gate.weight.detach()


def with_a_forward_of_its_own(moe):
    """Set on the instance."""
    forward = moe.gate.forward
    moe.gate.forward = lambda hidden: forward(1.5 * hidden)
    return 1.5 * moe.gate.weight.detach()


CHANGES = [wrapped, parametrized, with_a_child, of_a_class_of_its_own, with_a_forward_of_its_own]


# the main config for all, and by themselves what only a class or an instance tells
CASES = [(change, "both") for change in CHANGES]
CASES += [(change, name) for change in CHANGES[3:] for name in ("prune", "experts")]


@pytest.mark.parametrize(("change", "config"), CASES, ids=[f"{change.__name__}-{name}" for change, name in CASES])
def test_a_gate_that_is_more_than_its_weight(family, change, config):
    """Equals a plain gate with the weight that it amounts to; one with another weight does not."""
    # the one that goes by routing alone
    batch, config = batch_of(family), config_of(config, strategy="routing_similarity")
    model, plain = fresh(family), fresh(family)
    for layer, other in zip(moe_layers(model), moe_layers(plain), strict=True):
        other.mlp.gate.weight.data = change(layer.mlp)
    stock = logits_of(model, batch)
    same(stock, logits_of(plain, batch))
    assert_equal_when_enabled(model, plain, batch, config)
    fastmmoe.disable(model)
    assert torch.equal(logits_of(model, batch), stock)


def assert_equal_when_enabled(model, plain, batch, config):
    fastmmoe.enable(plain, config)
    want, fate = logits_of(plain, batch), [f.tolist() for stage in fastmmoe.report(plain).stages for f in stage.fate]
    fastmmoe.enable(model, config)
    same(logits_of(model, batch), want)
    assert [f.tolist() for stage in fastmmoe.report(model).stages for f in stage.fate] == fate


def test_a_gate_kept_in_float32(config):
    """In a bfloat16 model: the scores are computed in float32 either way. (InternVL's own gate does not take it.)"""
    family = "deepseek"
    batch = batch_of(family)
    batch["images"] = batch["images"].bfloat16()
    model, plain = fresh(family).bfloat16(), fresh(family).bfloat16()
    for layer in moe_layers(model):
        layer.mlp.gate.float()
    stock = logits_of(model, batch)
    assert torch.equal(logits_of(plain, batch), stock)
    assert_equal_when_enabled(model, plain, batch, config_of(config))
    fastmmoe.disable(model)
    assert torch.equal(logits_of(model, batch), stock)


# ------------------------------------------------------------------------------------------------ a bias


def biased(family):
    """A model whose gates add a bias to their logits."""
    model = fresh(family)
    for number, layer in enumerate(moe_layers(model)):
        gate = layer.mlp.gate

        class WithBias(type(gate)):
            def forward(self, hidden):
                # one more input that is always 1
                with_bias = torch.cat((self.weight, self.bias[:, None]), 1)
                hidden = hidden.reshape(-1, self.hidden_dim)
                ones = hidden.new_ones(len(hidden), 1)
                return torch.func.functional_call(self.plain[0], {"weight": with_bias}, (torch.cat((hidden, ones), 1),))

        twin = fresh(family)
        gate.plain = [moe_layers(twin)[number].mlp.gate]  # in a list: no child
        gate.plain[0].hidden_dim += 1
        gate.__class__ = WithBias
        gate.bias = nn.Parameter(noise(gate.weight.shape[0], scale=1.5, seed=number))
    return model


@pytest.fixture
def oracle(family, monkeypatch):
    """The float64 oracle of this family, with a bias in its gates."""
    sample = naive.Sample if family == "internvl" else naive_deepseek.Sample

    def gate(self, layer, x):
        logits = self.weight(layer, "mlp.gate.weight") @ x + self.weight(layer, "mlp.gate.bias")
        return logits.softmax(0) if family == "internvl" else logits.sigmoid()

    monkeypatch.setattr(sample, "gate", gate)
    return naive.greedy if family == "internvl" else naive_deepseek.greedy


NARROWEST = dict(routing=1e-5, windows=1e-3, tokens=1e-3)
SEEDS = {"internvl": 0, "deepseek": 1}


def test_a_gate_with_a_bias(family, config, oracle):
    batch, model = batch_of(family, (1,), seed=SEEDS[family]), biased(family)
    given = CONFIGS[config] | {"strategy": "routing_similarity"}
    ratio = given.pop("retention", 1.0) ** (1 / 2)
    settings = naive.Settings(**given, stage_keep_ratios=(ratio,) * len(given.get("prune_layers", ())))
    prefills = [generation.prefill for generation in oracle(model, batch, settings, 1)]
    for prefill in prefills:
        assert all(prefill.margins[kind] > gap for kind, gap in NARROWEST.items()), "take another seed"
    fastmmoe.enable(model, config_of(config, strategy="routing_similarity"))
    for got, valid, want in zip(logits_of(model, batch), batch["attention_mask"].bool(), prefills, strict=True):
        close(got[valid][list(want.positions)].double(), want.logits)


def test_fewer_experts_of_a_gate_with_a_bias(family):
    """The same by transformers' own experts, from the gate's edited output."""
    batch, model = batch_of(family), biased(family)
    with fewer_experts_by_hand(model, vision_of(batch), "experts"):
        want = logits_of(model, batch)
    fastmmoe.enable(model, config_of("experts"))
    valid = batch["attention_mask"].bool()
    close(logits_of(model, batch)[valid], want[valid])


# ------------------------------------------------------------------------------------------------ PEFT


def adapted(family, parameter):
    """A model with LoRA on a parameter of every MoE layer, and one with the same values and no adapter."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_parameters=[parameter], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(fresh(family), config).eval()
    torch.manual_seed(0)
    return model, peft.get_peft_model(fresh(family), config).eval().merge_and_unload()


@pytest.mark.parametrize(
    ("config", "parameter"),
    [("both", "mlp.gate.weight"), ("prune", "mlp.gate.weight"), ("both", "mlp.experts.down_proj")],
)
def test_lora_on_a_parameter(family, config, parameter):
    """Right, or an error that says which module it is about."""
    batch = batch_of(family)
    model, plain = adapted(family, parameter)
    stock = logits_of(model, batch)
    same(stock, logits_of(plain, batch))
    try:
        fastmmoe.enable(model, config_of(config))
    except ValueError as error:
        assert "gate" in str(error) or "experts" in str(error)
    else:
        assert_equal_when_enabled(model, plain, batch, config_of(config))
        fastmmoe.disable(model)
    assert torch.equal(logits_of(model, batch), stock)
