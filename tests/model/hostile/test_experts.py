"""Experts of other families: those that the kernels compute are computed; the others run themselves, pair by pair.

Each module is built by itself, its config a plain namespace, and called through transformers' interface.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import fastmmoe
from fastmmoe import FastMMoEConfig
from fastmmoe.prefill.expert_form import expert_form

from .common import batch_of, close, config_of, fewer_experts_by_hand, fresh, layers_of, logits_of, same, vision_of

E, H, I, K = 8, 64, 32, 4  # as in the tiny models

COMPUTED = {
    "qwen2_moe": "Qwen2MoeExperts",
    "qwen3_moe": "Qwen3MoeExperts",
    "qwen3_vl_moe": "Qwen3VLMoeTextExperts",
    "qwen3_5_moe": "Qwen3_5MoeExperts",
    "glm4_moe": "Glm4MoeExperts",
    "glm4v_moe": "Glm4vMoeTextExperts",
    "deepseek_v2": "DeepseekV2Experts",
    "deepseek_v3": "DeepseekV3Experts",
    "dots1": "Dots1Experts",
    "mixtral": "MixtralExperts",
    "olmoe": "OlmoeExperts",
    "deepseek_v4": "DeepseekV4Experts",  # clamps before the activation
    "minimax_m3_vl": "MiniMaxM3VLExperts",  # another activation, and no `act_fn`
    "glm5_next": "Glm5NextTextExperts",
    "gpt_oss": "GptOssExperts",  # biases, transposed, interleaved
    "aria": "AriaExperts",
}
# by the kernels; the model's own then run pair by pair
REFUSED = {
    "muse_spark": "MuseSparkExperts",  # a norm behind each expert
    "step3p7": "Step3p7Experts",  # clamps after it, and does not ask the interface
}


@pytest.mark.parametrize("limit", [0.5, 7.0, 60.0, 2000.0])
@pytest.mark.parametrize("family", ["glm5_next", "minimax_m3_vl", "gpt_oss"])
def test_a_limit_of_any_size_is_found(family, limit):
    """One that only large numbers reach is none that may be forgotten."""
    experts = experts_of(family, COMPUTED[family])
    for name in vars(experts).keys() & {"limit", "swiglu_limit"}:
        setattr(experts, name, limit)
    assert expert_form(experts).options["limit"] == limit


def experts_of(family, name):
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    config = SimpleNamespace(
        num_experts=E,
        num_local_experts=E,
        moe_num_experts=E,
        n_routed_experts=E,
        num_experts_per_tok=K,
        hidden_size=H,
        moe_hidden_size=H,
        intermediate_size=I,
        moe_intermediate_size=I,
        hidden_act="silu",
        swiglu_limit=0.5,
        swiglu_alpha=1.7,
        post_norm_eps=1e-6,
        _experts_implementation="eager",
    )
    return drawn(getattr(module, name)(config), config)


def drawn(experts, config):
    generator = torch.Generator().manual_seed(0)
    for weight in experts.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * (weight.shape[-1] ** -0.5)
    experts.config = config
    return experts.eval()


def arguments():
    """Hidden states, ids, weights."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(11, H, generator=generator)
    weights, ids = torch.rand(11, E, generator=generator).topk(K)
    return hidden, ids, weights


@torch.no_grad()
def call(experts, implementation):
    experts.config._experts_implementation = implementation
    return experts(*arguments())


@pytest.mark.parametrize(("family", "name"), COMPUTED.items(), ids=COMPUTED)
def test_experts_that_are_computed(family, name):
    experts = experts_of(family, name)
    want = call(experts, "eager")
    assert want.std() > 0.1
    got = call(experts, "fastmmoe")
    same(got, want)


@pytest.mark.parametrize(("family", "name"), REFUSED.items(), ids=REFUSED)
def test_experts_that_are_refused(family, name):
    experts = experts_of(family, name)
    implementation = ALL_EXPERTS_FUNCTIONS.get_interface("fastmmoe", None)
    with torch.no_grad(), pytest.raises(ValueError, match=name):
        implementation(experts, *arguments())
    # the same by the module itself, or else it does not ask and is right
    want = call(experts, "eager")
    try:
        got = call(experts, "fastmmoe")
    except ValueError as error:
        assert name in str(error)
    else:
        assert torch.equal(got, want)


def test_experts_with_a_gate_of_their_own_are_refused():
    """A subclass: nothing but the method tells."""
    plain = experts_of("qwen3_moe", "Qwen3MoeExperts")

    class ClampedExperts(type(plain)):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return self.act_fn(gate.clamp(max=0.1)) * up

    experts = drawn(ClampedExperts(plain.config), plain.config)
    with pytest.raises(ValueError, match="ClampedExperts"):
        call(experts, "fastmmoe")


def test_experts_with_a_forward_of_their_own_are_not_passed_over(family):
    """Scaled outputs: right, or refused."""
    model, plain = fresh(family), fresh(family)
    for layer, other in zip(layers_of(model)[1:], layers_of(plain)[1:], strict=True):
        experts = layer.mlp.experts

        class DoubledExperts(type(experts)):
            def forward(self, *args):
                return 2 * super().forward(*args)

        experts.__class__ = DoubledExperts
        other.mlp.experts.down_proj.data *= 2
    batch = batch_of(family)
    same(logits_of(model, batch), logits_of(plain, batch))
    fastmmoe.enable(plain, config_of("experts"))
    try:
        fastmmoe.enable(model, config_of("experts"))
    except ValueError as error:
        assert "DoubledExperts" in str(error)
    else:
        close(logits_of(model, batch), logits_of(plain, batch))


@pytest.mark.parametrize(("other", "experts"), REFUSED.items(), ids=REFUSED)
def test_a_model_with_such_experts(family, other, experts):
    """Right, or refused by the name of the class; pruning alone leaves experts alone."""
    model, batch = fresh(family), batch_of(family, (2,))
    layers_of(model)[4].mlp.experts = experts_of(other, experts)
    stock = logits_of(model, batch)
    with fewer_experts_by_hand(model, vision_of(batch), "experts"):
        want = logits_of(model, batch)
    try:
        fastmmoe.enable(model, config_of("experts"))
    except ValueError as error:
        assert experts in str(error)
    else:
        close(logits_of(model, batch), want)
    fastmmoe.disable(model)
    assert torch.equal(logits_of(model, batch), stock)
    fastmmoe.enable(model, FastMMoEConfig(vision_top_k=2, reduction_layer=5))
    fastmmoe.enable(model, config_of("prune"))
    assert logits_of(model, batch).isfinite().all()


@pytest.mark.parametrize("other", ["qwen3_vl_moe", "glm4v_moe", "deepseek_v2", "mixtral"])
def test_a_model_with_experts_of_another_class(family, other):
    """The same weights in another class that computes the same."""
    model, plain = fresh(family), fresh(family)
    fastmmoe.enable(plain, config_of("both"))
    for layer in layers_of(model)[1:]:
        experts = experts_of(other, COMPUTED[other])
        experts.gate_up_proj, experts.down_proj = (
            nn.Parameter(weight.data) for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj)
        )
        layer.mlp.experts = experts
    fastmmoe.enable(model, config_of("both"))
    assert torch.equal(logits_of(model, batch_of(family)), logits_of(plain, batch_of(family)))
