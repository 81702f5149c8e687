"""Models whose vision tokens share a number of experts, against gates written down once more, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import fastmmoe
from fastmmoe import FastMMoEConfig, prefill_time
from fastmmoe.config import ExpertChoice
from fastmmoe.cost.devices import Ceilings
from fastmmoe.families import ARCHITECTURES
from fastmmoe.prefill.installation import plan_in_force

from .methods import skipping
from .tiny import IMAGE_TOKEN, tiny_batch, tiny_internvl

CLOSE = dict(rtol=0, atol=2e-5)
CONFIGS = {
    "budget": FastMMoEConfig(expert_budget=5, reduction_layer=1),
    "least": FastMMoEConfig(expert_budget=4, reduction_layer=0),
    "fewer-experts": FastMMoEConfig(expert_budget=3, vision_top_k=2, reduction_layer=2),
    "one": FastMMoEConfig(expert_budget=1, vision_top_k=1, reduction_layer=3),
}


@contextmanager
def by_hand(
    model: torch.nn.Module, config: FastMMoEConfig, vision: torch.Tensor, valid: torch.Tensor
) -> Iterator[dict[int, set[int]]]:
    """The stock model with gates that share; yields layer -> experts that vision tokens came to."""
    used: dict[int, set[int]] = {}
    is_vision, counts = vision.flatten().tolist(), valid.flatten().tolist()

    def gate_of(number: int, gate: torch.nn.Module):
        def choose(hidden: torch.Tensor) -> tuple:
            logits, weights, ids = type(gate).forward(gate, hidden)
            rows, top_k = logits.float().softmax(-1).tolist(), weights.shape[1]
            few = top_k if config.vision_top_k is None else config.vision_top_k
            best = [sorted(range(len(row)), key=lambda e, row=row: -row[e])[:top_k] for row in rows]
            demand = [0.0] * len(rows[0])
            for t, row in enumerate(rows):
                for e in best[t]:
                    demand[e] += row[e] ** 8 if is_vision[t] and counts[t] else 0.0
            shared = sorted(range(len(demand)), key=lambda e: -demand[e])[: config.expert_budget]
            weights, ids, used[number] = weights.clone(), ids.clone(), set()
            for t, row in enumerate(rows):
                if not (is_vision[t] and counts[t]):
                    continue
                mine = sorted(shared, key=lambda e, row=row: -row[e])[:few]
                whole = 1.0 if gate.norm_topk_prob else sum(row[e] for e in best[t])
                share = whole / sum(row[e] for e in mine)
                weights[t], ids[t] = 0.0, 0
                for slot, e in enumerate(mine):
                    weights[t, slot], ids[t, slot] = row[e] * share, e
                used[number] |= set(mine)
            return logits, weights, ids

        return choose

    gates = {n: layer.mlp.gate for n, layer in enumerate(model.model.language_model.layers)}
    for number, gate in gates.items():
        if number >= config.reduction_layer:
            gate.forward = gate_of(number, gate)
    try:
        yield used
    finally:
        for gate in gates.values():
            vars(gate).pop("forward", None)


@pytest.mark.parametrize("normalised", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("images", [(1,), (1, 2), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_a_prefill_equals_gates_by_hand(config, images, normalised):
    model = tiny_internvl(norm_topk_prob=normalised)
    batch = tiny_batch(model, images)
    valid = batch["attention_mask"].bool()
    stock = model(**batch).logits[valid]
    with by_hand(model, config, batch["input_ids"] == IMAGE_TOKEN, valid) as used:
        want = model(**batch).logits[valid]
    assert used and all(len(experts) <= config.expert_budget for experts in used.values())
    with fastmmoe.enabled(model, config):
        got = model(**batch).logits[valid]
        report = fastmmoe.report(model)
    torch.testing.assert_close(got, want, **CLOSE)
    assert not torch.allclose(got, stock, atol=1e-2)
    assert (report.flops.saved > 0) == (config.vision_top_k is not None)


@torch.no_grad()
def test_decoding_is_the_stock_path():
    model, config = tiny_internvl(), CONFIGS["budget"]
    batch = tiny_batch(model)
    with fastmmoe.enabled(model, config):
        prefill = model(**batch, use_cache=True)
        token, mask = prefill.logits[:, -1:].argmax(-1), torch.ones(2, 1, dtype=torch.int64)
        given = dict(input_ids=token, attention_mask=torch.cat((batch["attention_mask"], mask), 1))
        got = model(**given, past_key_values=prefill.past_key_values).logits
        again = model(**batch, use_cache=True)
    want = model(**given, past_key_values=again.past_key_values).logits
    assert torch.equal(got, want)


@torch.no_grad()
def test_a_forward_shares_whatever_its_rows():
    """A packed row is the same forward as a padded batch, and not those of its samples."""
    model, config = tiny_internvl(), CONFIGS["least"]
    batch = tiny_batch(model, (1, 2))
    with fastmmoe.enabled(model, config):
        together = model(**batch).logits[batch["attention_mask"].bool()]
        torch.testing.assert_close(model(**fastmmoe.pack_batch(batch)).logits[0], together, rtol=1e-4, atol=1e-4)
        row = batch["attention_mask"][0].bool()
        alone = model(input_ids=batch["input_ids"][0][row][None], pixel_values=batch["pixel_values"][:1]).logits[0]
    assert not torch.allclose(alone, together[: len(alone)], atol=1e-2)


@torch.no_grad()
def test_with_pruning_and_skipping():
    """Each layer's share is of the tokens that are left; nothing beyond it runs, and some of it is skipped."""
    model, seen = tiny_internvl(), {}
    batch = tiny_batch(model, (2,))

    def look(number):
        return lambda module, args, output: seen.__setitem__(number, output[2])

    for number, layer in enumerate(model.model.language_model.layers):
        layer.mlp.gate.register_forward_hook(look(number))
    config = skipping(expert_budget=4, reduction_layer=1, prune_layers=(1, 3), retention=0.4, vision_top_k=3)
    with fastmmoe.enabled(model, config):
        model(**batch)
        segments = plan_in_force(model).last
        pairs = fastmmoe.report(model).expert_pairs
    for number, ids in seen.items():
        vision = segments[(number >= 1) + (number >= 3)].vision_rows.flatten()
        active = ids[vision] < 8
        assert len(ids) == len(vision) and active.sum() == pairs[number][1]
        if number >= 1:
            assert len(set(ids[vision][active].tolist())) <= 4 and active.sum(1).max() <= 3
            assert not active[:, :3].all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FastMMoEConfig(expert_budget=3), "expert_budget=3: expected at least the 4 experts"),
        (FastMMoEConfig(expert_budget=8), "expert_budget=8: expected fewer than the model's 8 experts"),
        (FastMMoEConfig(expert_budget=5, reduction_layer=6), "reduction_layer=6"),
    ],
)
def test_a_budget_that_does_not_fit(config, message):
    model = tiny_internvl()
    with pytest.raises(ValueError, match=message):
        fastmmoe.enable(model, config)
    assert "forward" not in vars(model.model.language_model)


def test_bad_budget():
    for wrong, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="expert_budget: expected an int >= 1"):
            FastMMoEConfig(expert_budget=wrong)
    config = FastMMoEConfig(expert_budget=4, vision_top_k=2)
    assert FastMMoEConfig.from_dict(config.to_dict()) == config
    assert config.expert_choice(1, 4) is None and config.expert_choice(2, 4) == ExpertChoice(2, budget=4)


def test_the_model_of_time_reads_fewer_experts():
    """On a device where nothing but bytes takes time: of 128 experts, text comes to some and vision to 16 at most."""
    by_bytes, name = Ceilings("bytes", 1e30, 1e12, 0.0, "bfloat16", "hand"), "internvl3.5-30b-a3b"
    times = [
        prefill_time(name, 20, 1024, FastMMoEConfig(expert_budget=budget, vision_top_k=4), by_bytes)
        for budget in (None, 16)
    ]
    free, shared = (
        {op.name: op.weight_bytes for op in one.per_layer[5].reduced_ops}["experts"] / (2 * 3 * 2048 * 768)
        for one in times
    )
    text = 128 * (1 - (1 - 8 / 128) ** 20)
    assert free == pytest.approx(128, rel=1e-6) and shared == pytest.approx(text + 16 * (1 - text / 128), rel=1e-6)
    assert times[1].reduced < times[0].reduced
    assert ARCHITECTURES[name].num_experts == 128
