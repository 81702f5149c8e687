"""`experts_implementation="fastmmoe"` in transformers models of several families, FastMMoE itself not enabled."""

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import fastmmoe.prefill.experts  # noqa: F401  registers the implementation

SMALL = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    intermediate_size=24, num_experts_per_tok=2, initializer_range=0.3,
)  # fmt: skip
DEEPSEEK = dict(
    n_routed_experts=8, moe_intermediate_size=24, n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=16,
    q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
)  # fmt: skip
FAMILIES = {
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**SMALL, num_experts=8, moe_intermediate_size=24)),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**SMALL, num_local_experts=8)),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig(**SMALL, num_experts=8)),
    "glm4_moe": (Glm4MoeForCausalLM, Glm4MoeConfig(**SMALL, n_routed_experts=8, moe_intermediate_size=24)),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}, **DEEPSEEK),
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig(**SMALL, num_local_experts=4, layer_types=["full_attention"] * 2, attn_implementation="eager"),
    ),
}


def build(cls, config):
    torch.manual_seed(0)
    return cls(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_eager(family):
    model = build(*FAMILIES[family])
    ids = torch.arange(30).view(2, 15)
    with torch.no_grad():
        model.set_experts_implementation("eager")
        want = model(ids).logits
        model.set_experts_implementation("fastmmoe")
        with torch.profiler.profile() as profile:
            got = model(ids).logits
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        model.set_experts_implementation("eager")
        eager = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert "fastmmoe::moe_experts" in {event.key for event in profile.key_averages()}
    assert tokens.tolist() == eager.tolist()


def test_sentinels_of_expert_parallelism():
    """A rank sees ids of experts it does not hold as `num_experts`: they add nothing, whatever their weight."""
    experts = build(*FAMILIES["qwen3_moe"]).model.layers[0].mlp.experts
    experts._is_expert_parallel = True
    experts.config._experts_implementation = "fastmmoe"
    hidden, ids = torch.randn(9, 32), torch.randint(0, 8, (9, 2), generator=torch.Generator().manual_seed(0))
    weights = torch.rand(9, 2)
    with torch.no_grad():
        here = torch.where(ids < 4, ids, 8)
        there = torch.where(ids >= 4, ids, 8)
        whole = experts(hidden, ids, weights)
        parts = experts(hidden, here, weights), experts(hidden, there, weights)
        assert (experts(hidden, torch.full_like(ids, 8), weights) == 0).all()
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-5)
    assert all((part.abs().sum(-1) == 0).any() for part in parts)


def test_experts_of_an_unknown_form_are_refused():
    model = build(*FAMILIES["gpt_oss"])
    for layer in model.model.layers:
        layer.mlp.experts.limit = None  # what it clamps at is not to be found
    model.set_experts_implementation("fastmmoe")
    with pytest.raises(ValueError, match="what GptOssExperts does with gate and up cannot be asked"):
        model(torch.arange(5)[None])


def test_training_is_refused():
    """The kernels have no backward: an error, not a silent zero gradient."""
    model = build(*FAMILIES["qwen3_moe"])
    model.set_experts_implementation("fastmmoe")
    with pytest.raises(RuntimeError, match="autograd|backward|derivative"):
        model(torch.arange(5)[None]).logits.sum().backward()
