"""A prune layer's attention is asked for under a name of ours that nobody can tell from the real one."""

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

import fastmmoe
from fastmmoe import FastMMoEConfig

from .tiny import tiny_batch, tiny_internvl

PRUNE = FastMMoEConfig(prune_layers=(1, 3), retention=0.4, merge_ratio=0.3)


class Branching(Qwen3MoeAttention):
    """As sparse attention does, asks for the implementation by name, in each of the ways that code asks."""

    def forward(self, hidden_states, **kwargs):
        name = self.config._attn_implementation
        known = {"eager": 1, "sdpa": 2}
        asked = name == "sdpa" or name == "eager", name in ("eager", "sdpa"), name in list(known), not name > "sdpa"
        if not all(asked) or name.startswith("flash") or "fastmmoe" in str(name) or f"{name}" not in known:
            return torch.full_like(hidden_states, float("nan")), None
        return super().forward(hidden_states, **kwargs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_code_that_branches_on_the_name_takes_its_branch(implementation):
    model = tiny_internvl(attn_implementation=implementation)
    batch = tiny_batch(model)
    fastmmoe.enable(model, PRUNE)
    with torch.no_grad():
        want = model(**batch).logits
        for layer in model.model.language_model.layers:
            layer.self_attn.__class__ = Branching
        got = model(**batch).logits
    assert torch.equal(got, want)
    assert sum(fastmmoe.report(model).stages[0].dropped) > 0


def test_the_implementation_may_change_while_enabled():
    model = tiny_internvl(attn_implementation="sdpa")
    batch = tiny_batch(model)
    fastmmoe.enable(model, PRUNE)
    with torch.no_grad():
        want = model(**batch).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(**batch).logits, want, rtol=1e-3, atol=1e-3)
    fastmmoe.disable(model)
    assert model.model.language_model.layers[1].self_attn.config._attn_implementation == "eager"
