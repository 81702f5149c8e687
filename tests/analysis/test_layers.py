"""Routing similarity and magnitude stability against loops over tokens, on batches with padding."""

import math

import pytest
import torch
from model.tiny import tiny_internvl

from fastmmoe.study.magnitude import magnitude_stability
from fastmmoe.study.observe import PerPrompt
from fastmmoe.study.prompts import Prompt, make_batches
from fastmmoe.study.routing import routing_similarity

LENGTHS = (31, 24, 27)


@pytest.fixture(scope="module")
def model():
    model = tiny_internvl()
    model.model.language_model.set_experts_implementation("fastmmoe")
    return model


@pytest.fixture(scope="module")
def prompts(model):
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in LENGTHS:
        vision = torch.zeros(length, dtype=torch.bool)
        vision[3:11] = vision[14:20] = True  # two runs: tokens 10 and 14 are no neighbours
        walk = torch.randn(length, model.config.text_config.hidden_size, generator=generator).cumsum(0)
        made.append(Prompt(walk / walk.norm(dim=-1, keepdim=True) * 6, vision, torch.arange(length)))
    return made


@pytest.fixture(scope="module")
def seen(model, prompts):
    """Per prompt and layer, the MoE's input [n, H]; one prompt at a time, without padding."""
    found = []
    for prompt in prompts:
        inputs = []
        handles = [
            layer.mlp.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0][0]))
            for layer in model.model.language_model.layers
        ]
        with torch.no_grad():
            model(inputs_embeds=prompt.embeddings[None])
        for handle in handles:
            handle.remove()
        found.append(inputs)
    return found


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def mean(values):
    return sum(values) / len(values)


def positions(prompt, modality):
    return [i for i, is_vision in enumerate(prompt.vision.tolist()) if is_vision == (modality == "vision")]


def table(rows):
    return {(row["layer"], row["modality"], row["quantity"]): row for row in rows}


@torch.no_grad()
def test_routing_similarity(model, prompts, seen):
    found = table(routing_similarity(model, make_batches(prompts, 2)))
    for number, layer in enumerate(model.model.language_model.layers):
        for modality in ("vision", "text"):
            expected = {"adjacent": [], "any pair": [], "entropy": []}
            for prompt, inputs in zip(prompts, seen, strict=True):
                probs = (inputs[number] @ layer.mlp.gate.weight.T).softmax(-1)
                tokens = positions(prompt, modality)
                neighbours = [(i, i + 1) for i in tokens if i + 1 in tokens]
                pairs = [(i, j) for i in tokens for j in tokens if i != j]
                expected["adjacent"].append(mean([cosine(probs[i], probs[j]) for i, j in neighbours]))
                expected["any pair"].append(mean([cosine(probs[i], probs[j]) for i, j in pairs]))
                entropies = [-sum(p * math.log(p) for p in probs[i].tolist()) for i in tokens]
                expected["entropy"].append(mean(entropies))
            for quantity, values in expected.items():
                row = found[number, modality, quantity]
                assert row["mean"] == pytest.approx(mean(values), abs=1e-5) and row["prompts"] == len(LENGTHS)
                spread = (sum((v - mean(values)) ** 2 for v in values) / 2 / 3) ** 0.5
                assert row["standard_error"] == pytest.approx(spread, abs=1e-5)


@torch.no_grad()
def test_magnitude_stability(model, prompts, seen):
    found = table(magnitude_stability(model, make_batches(prompts, 3)))
    for number, layer in enumerate(model.model.language_model.layers):
        experts = layer.mlp.experts
        for modality in ("vision", "text"):
            values = []
            for prompt, inputs in zip(prompts, seen, strict=True):
                stabilities = []
                for i in positions(prompt, modality):
                    x = inputs[number][i]
                    norms = []
                    for expert in (layer.mlp.gate.weight @ x).topk(4).indices.tolist():
                        gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
                        out = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                        norms.append(float(out.norm()))
                    deviation = (sum((norm - mean(norms)) ** 2 for norm in norms) / 4) ** 0.5
                    stabilities.append(1 - deviation / mean(norms))
                values.append(mean(stabilities))
            assert found[number, modality, "stability"]["mean"] == pytest.approx(mean(values), abs=1e-4)


def test_prompts_without_a_pair_do_not_count():
    found = PerPrompt()
    found.add(0, "text", "adjacent", torch.tensor([1.5, 0.0]), torch.tensor([3, 0]))
    (row,) = found.rows()
    assert row["mean"] == pytest.approx(0.5) and row["prompts"] == 1 and row["standard_error"] is None


def test_nothing_stays_on_the_model(model, prompts):
    before = [len(module._forward_hooks) for module in model.modules()]
    routing_similarity(model, make_batches(prompts, 3))
    assert [len(module._forward_hooks) for module in model.modules()] == before
