"""The choice of experts and what runs on it, with weights as vLLM's Triton kernel has them for `moe_experts`."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from fastmmoe.engines.vllm.experts import VisionExperts, VisionRouter

T, E, K, H, I = 37, 8, 4, 32, 24


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    vision = draw(T) > 0.3
    experts = SimpleNamespace(
        w13_weight=draw(E, 2 * I, H) / H**0.5,
        w2_weight=draw(E, H, I) / I**0.5,
        quant_method=SimpleNamespace(unquantized_backend=UnquantizedMoeBackend.TRITON),
        forward_modular=lambda **inputs: ("stock", inputs),
    )
    tokens = SimpleNamespace(vision=vision, n_vision=int(vision.sum()))
    return SimpleNamespace(routed_experts=experts, tokens=tokens, x=draw(T, H), logits=2 * draw(T, E))


def run(layer, tokens, vision_top_k=2):
    router = VisionRouter(
        CPURouter(K, E), lambda: tokens, vision_top_k, {"top_k": K, "norm_topk_prob": True}, "auto"
    )
    weights, ids = router.select_experts(layer.x, layer.logits)
    experts = VisionExperts(layer, lambda: tokens, vision_top_k, K, "auto")
    return weights, ids, experts(x=layer.x, topk_weights=weights, topk_ids=ids)


@pytest.mark.parametrize("vision_top_k", [1, 2, 3])
def test_against_a_loop(layer, vision_top_k):
    weights, ids, output = run(layer, layer.tokens, vision_top_k)
    for t in range(T):
        k = vision_top_k if layer.tokens.vision[t] else K
        probs = layer.logits[t].double().softmax(-1)
        chosen = probs.topk(k).indices
        assert sorted(ids[t][ids[t] < E].tolist()) == sorted(chosen.tolist())
        want = torch.zeros(H, dtype=torch.float64)
        for expert in chosen:
            gate, up = (layer.routed_experts.w13_weight[expert].double() @ layer.x[t].double()).chunk(2)
            hidden = torch.nn.functional.silu(gate) * up
            want += probs[expert] / probs[chosen].sum() * (layer.routed_experts.w2_weight[expert].double() @ hidden)
        torch.testing.assert_close(output[t].double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [None, SimpleNamespace(vision=torch.zeros(T, dtype=torch.bool), n_vision=0)])
def test_steps_without_vision_tokens_are_stock(layer, tokens):
    weights, ids, (said, inputs) = run(layer, tokens)
    assert said == "stock" and inputs["topk_ids"] is ids and inputs["topk_weights"] is weights
    stock = CPURouter(K, E).select_experts(layer.x, layer.logits)
    assert torch.equal(weights, stock[0]) and torch.equal(ids, stock[1])
