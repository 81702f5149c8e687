"""Models that skip experts by need, against the published simulation: all experts run, with weights set to 0.

The simulation is put into the stock model's gates and knows every token by its id. Families are compared in
test_parity_families.py, the op in `tests/kernels`.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from transformers import DynamicCache

import fastmmoe
from fastmmoe import FastMMoEConfig, MoDESConfig, flops
from fastmmoe.config import ExpertChoice
from fastmmoe.families import find_text_model
from fastmmoe_kernels import VisionLayout

from .methods import skipping
from .tiny import IMAGE_TOKEN, TOKENS_PER_TILE, tiny_batch, tiny_internvl

CLOSE = dict(rtol=0, atol=2e-5)
SPECIAL = tuple(range(30, 70))  # of 150 words
ANSWER = 5


@dataclass(frozen=True)
class Case:
    config: MoDESConfig
    batch: dict = field(default_factory=dict)


CASES = {
    "both": Case(skipping()),
    "special": Case(skipping(special_tokens=SPECIAL)),
    "special-image": Case(skipping(special_tokens=(*SPECIAL, IMAGE_TOKEN))),
    "text-alone": Case(skipping(vision_threshold=0.0, special_tokens=SPECIAL)),
    "vision-alone": Case(skipping(text_threshold=0.0)),
    "all-experts-of-a-layer": Case(skipping(text_importance=(1.0, 0.0, 1.0, 1.0, 0.0, 1.0))),
    "fewer-experts": Case(skipping(vision_top_k=2, reduction_layer=1, vision_threshold=0.45)),
    "right-padding": Case(skipping(special_tokens=SPECIAL), dict(padding_side="right")),
    "no-image-in-a-sample": Case(skipping(special_tokens=SPECIAL), dict(images_per_sample=(2, 0, 1))),
}


@dataclass
class Simulation:
    """What the simulated gates know and have seen.

    Attributes:
        ids: of the tokens that the next forward has, [B, n].
        ran: per layer, pairs with an expert whose weight is not 0, of text and of vision tokens without padding.
    """

    config: MoDESConfig
    ids: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    ran: dict[int, tuple[int, int]] = field(default_factory=dict)


@contextmanager
def simulated(model: torch.nn.Module, config: MoDESConfig) -> Iterator[Simulation]:
    """The stock model, whose gates set the weights of light experts to 0."""
    state, gates = Simulation(config), [layer.mlp.gate for layer in model.model.language_model.layers]

    def gate_of(number: int, gate: torch.nn.Module):
        def choose(hidden: torch.Tensor) -> tuple:
            logits, weights, ids = type(gate).forward(gate, hidden)
            tokens = state.ids.flatten().tolist()
            valid = torch.ones(len(tokens)) if state.valid is None else state.valid.flatten()
            ran, weights = [0, 0], weights.clone()
            for t, token in enumerate(tokens):
                is_vision = token == IMAGE_TOKEN
                if is_vision and config.vision_top_k is not None and number >= config.reduction_layer:
                    weights[t, config.vision_top_k :] = 0.0
                    weights[t] /= weights[t].sum()
                importance = (config.vision_importance if is_vision else config.text_importance)[number]
                tau = config.vision_threshold if is_vision else config.text_threshold
                for k in range(weights.shape[1]):
                    if weights[t, k] * importance < tau and (is_vision or token not in config.special_tokens):
                        weights[t, k] = 0.0
                ran[is_vision] += int((weights[t] > 0).sum() * valid[t])
            state.ran[number] = tuple(ran)
            return logits, weights, ids

        return choose

    for number, gate in enumerate(gates):
        gate.forward = gate_of(number, gate)
    try:
        yield state
    finally:
        for gate in gates:
            del gate.forward


def run(model, batch, state=None, steps=ANSWER):
    """Logits at valid tokens of the prompt, and of greedy steps behind it."""
    valid, found = batch["attention_mask"].bool(), []
    mask, ids, cache = batch["attention_mask"], batch["input_ids"], DynamicCache(config=model.config.text_config)
    if state is not None:
        state.ids, state.valid = ids, mask
    out = model(**batch, past_key_values=cache, use_cache=True).logits
    ran = None if state is None else dict(state.ran)
    found.append(out[valid])
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    token = out[torch.arange(len(out)), last].argmax(-1, keepdim=True)
    for _ in range(steps):
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
        positions = mask.cumsum(1)[:, -1:] - 1
        if state is not None:
            state.ids, state.valid = token, None
        given = dict(attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        step = model(input_ids=token, **given)
        found.append(step.logits[:, 0])
        token = step.logits[:, -1].argmax(-1, keepdim=True)
    return found, ran


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@torch.no_grad()
def test_forward_and_generate_equal_the_oracle(case):
    model = tiny_internvl()
    batch = tiny_batch(model, **case.batch)
    stock = run(model, batch)[0]
    with simulated(model, case.config) as state:
        want, ran = run(model, batch, state)
    with fastmmoe.enabled(model, case.config):
        got, _ = run(model, batch)
        report = fastmmoe.report(model)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert not torch.allclose(got[0], stock[0], atol=1e-2)
    # decoding is reduced where text is
    assert not torch.allclose(got[1], stock[1], atol=1e-2)
    assert report.expert_pairs == ran
    assert torch.equal(run(model, batch)[0][0], stock[0])


@torch.no_grad()
def test_the_report_counts_what_ran():
    model, config = tiny_internvl(), skipping(special_tokens=SPECIAL)
    batch = tiny_batch(model)
    with simulated(model, config) as state:
        _, ran = run(model, batch, state, steps=0)
    with fastmmoe.enabled(model, config):
        model(**batch)
        report = fastmmoe.report(model)
    tokens = sum(report.n_text) + sum(report.n_vision)
    pairs = sum(map(sum, ran.values()))
    assert report.experts_skipped == pytest.approx(1 - pairs / (6 * 4 * tokens)) and 0.2 < report.experts_skipped < 0.8
    bound = flops(model, report.n_text, report.n_vision, config)
    assert bound.reduced == bound.dense == report.flops.dense
    # three matrices of 64 x 32 per expert
    skipped = 6 * 4 * tokens - pairs
    assert report.flops.reduced == bound.dense - skipped * 2 * 3 * 64 * 32
    counted = flops(model, report.n_text, report.n_vision, config, expert_pairs=ran)
    assert counted == report.flops and report.to_dict()["experts_skipped"] == report.experts_skipped
    assert f"experts skipped by need: {report.experts_skipped:.1%}" in str(report)
    assert report.time("h100").reduced <= report.time("h100").dense


@torch.no_grad()
def test_with_pruning_every_stage_is_one_of_the_tokens_that_are_left():
    """Of a layer behind a stage, experts run for tokens that are left; a sample is in a batch what it is alone."""
    model, config = tiny_internvl(), skipping(prune_layers=(1, 3), retention=0.4, special_tokens=SPECIAL)
    batch = tiny_batch(model, (1, 2))
    first = 0
    with fastmmoe.enabled(model, config):
        together = model(**batch).logits[:, -1]
        whole = fastmmoe.report(model)
        pairs = []
        for row, images in enumerate((1, 2)):
            valid = batch["attention_mask"][row].bool()
            pictures = batch["pixel_values"][first : first + images]
            alone = model(input_ids=batch["input_ids"][row][valid][None], pixel_values=pictures).logits[0, -1]
            torch.testing.assert_close(together[row], alone, **CLOSE)
            pairs.append(fastmmoe.report(model).expert_pairs)
            first += images
    for layer, (text, vision) in whole.expert_pairs.items():
        assert (text, vision) == tuple(map(sum, zip(*(one[layer] for one in pairs), strict=True)))
        left = sum(whole.tokens_per_layer[layer]) - sum(whole.n_text)
        assert 0 < vision < 4 * left and 0 < text < 4 * sum(whole.n_text)


@pytest.mark.parametrize("how", ["ids", "embeddings", "text-model", "fixed-layout", "packed"])
@torch.no_grad()
def test_text_alone(how):
    """A prompt without pictures, however it comes, is text but for special tokens."""
    model, config = tiny_internvl(), skipping(special_tokens=SPECIAL)
    batch = {name: value[:1] for name, value in tiny_batch(model, (0, 0)).items()}
    batch = {name: value[:, batch["attention_mask"][0].bool()] for name, value in batch.items()}
    ids, n = batch["input_ids"], batch["input_ids"].shape[1]
    with simulated(model, config) as state:
        state.ids = ids
        want = model(**batch).logits
    text = model.model.language_model
    with fastmmoe.enabled(model, config):
        if how == "ids":
            got = model(**batch).logits
        elif how == "embeddings":  # nothing tells whether there are vision tokens among them
            with pytest.warns(UserWarning, match="runs on the stock model"):
                got = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        elif how == "text-model":
            got = model.lm_head(text(input_ids=ids).last_hidden_state)
        elif how == "fixed-layout":
            layout = VisionLayout.from_mask(torch.zeros(1, n, dtype=torch.bool))
            with fastmmoe.fixed_layout(model, layout):
                got = model.lm_head(text(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state)
        else:
            got = model(**fastmmoe.pack_batch(batch)).logits
    if how == "embeddings":
        want = model(**batch).logits
    torch.testing.assert_close(got, want, **CLOSE)


@torch.no_grad()
def test_a_prompt_of_embeddings_with_its_picture():
    """Special tokens are found in the embedding table."""
    model, config = tiny_internvl(), skipping(special_tokens=SPECIAL)
    batch = tiny_batch(model)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    others = {name: value for name, value in batch.items() if name != "input_ids"}
    with fastmmoe.enabled(model, config):
        want = model(**batch).logits[:, -1]
        torch.testing.assert_close(model(inputs_embeds=embeds, **others).logits[:, -1], want, **CLOSE)


@torch.no_grad()
def test_too_few_vision_tokens_run_the_stock_model():
    model = tiny_internvl()
    config = skipping(text_threshold=0.0, min_vision_tokens=2 * TOKENS_PER_TILE + 1)
    batch = tiny_batch(model, (1, 1))
    want = model(**batch).logits
    with fastmmoe.enabled(model, config):
        assert torch.equal(model(**batch).logits, want)
        report = fastmmoe.report(model)
        assert report.skipped and report.expert_pairs == {} and report.experts_skipped == 0.0
    with fastmmoe.enabled(model, replace(config, min_vision_tokens=2 * TOKENS_PER_TILE)):
        assert not torch.allclose(model(**batch).logits, want, atol=1e-2)


@torch.no_grad()
def test_threads_do_not_count_for_one_another():
    """A report is of one forward or counts all that may have run, but never another's experts."""
    model = tiny_internvl()
    fastmmoe.enable(model, skipping())
    batches = [tiny_batch(model, (1 + seed % 2,), seed=seed) for seed in range(4)]
    alone, possible = [], {}
    for batch in batches:
        alone.append(model(**batch).logits)
        for layer, pairs in fastmmoe.report(model).expert_pairs.items():
            possible.setdefault(layer, set()).add(pairs)
    wrong = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(6):
                if not torch.equal(model(**batches[number]).logits, alone[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    found = fastmmoe.report(model).expert_pairs
    assert all(pairs in possible[layer] for layer, pairs in found.items())


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (dict(text_threshold=-0.1), ValueError, "text_threshold: expected a finite number >= 0"),
        (dict(vision_threshold=math.nan), ValueError, "vision_threshold: expected a finite number"),
        (dict(vision_threshold="0.1"), TypeError, "vision_threshold: expected a finite number"),
        (dict(text_threshold=0.1), ValueError, "text_importance: expected a number per layer"),
        (dict(vision_threshold=0.1, text_importance=(1.0,)), ValueError, "vision_importance: expected a number per"),
        (dict(text_importance=(1.0, -1.0)), ValueError, r"text_importance\[1\]: expected a finite number >= 0"),
        (dict(text_importance=1.0), TypeError, "text_importance: expected a tuple or list"),
        (dict(special_tokens=(1,)), ValueError, "special_tokens: expected none with text_threshold=0.0"),
        (
            dict(text_threshold=0.1, text_importance=(1.0,), min_vision_tokens=9),
            ValueError,
            "min_vision_tokens=9: expected 0 with text_threshold=0.1",
        ),
        (dict(special_tokens=(-1,)), ValueError, r"special_tokens\[0\]: expected an int >= 0"),
        (dict(window=0), ValueError, "window"),
    ],
)
def test_bad_config(values, error, message):
    with pytest.raises(error, match=message):
        MoDESConfig(**values)


def test_a_config_that_does_not_fit_the_model():
    model = tiny_internvl()
    with pytest.raises(ValueError, match="text_importance: expected one number for each of .* 6 layers, got 5"):
        fastmmoe.enable(model, skipping(5))
    with pytest.raises(ValueError, match="vision_top_k=5"):
        fastmmoe.enable(model, skipping(vision_top_k=5))
    assert "forward" not in vars(model.model.language_model)


def test_what_a_layer_skips():
    config = MoDESConfig(
        text_threshold=0.5, vision_threshold=0.2, text_importance=(2.0, 0.0), vision_importance=(0.0, 0.5),
        vision_top_k=3, reduction_layer=1,
    )  # fmt: skip
    assert config.expert_choice(0, 4) == ExpertChoice(4, (0.25, math.inf))
    assert config.expert_choice(1, 4) == ExpertChoice(3, (math.inf, 0.4))
    assert MoDESConfig().expert_choice(0, 4) is None
    assert MoDESConfig(vision_top_k=2).expert_choice(2, 4) == ExpertChoice(2)


def test_a_calibration_is_read_from_its_file(tmp_path):
    config, path = skipping(special_tokens=(1, 2)), tmp_path / "modes.json"
    path.write_text(json.dumps({"type": "MoDESConfig", "config": config.to_dict(), "calibration": {}}))
    assert MoDESConfig.from_file(path) == config
    pruned = MoDESConfig.from_file(path, prune_layers=(1,), retention=0.5)
    assert pruned == replace(config, prune_layers=(1,), retention=0.5)
    for content in ("", "[]", "{}", '{"config": []}', '{"config": {"speed": 1}}', "\udcff"):
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError):
            MoDESConfig.from_file(path)
    path.write_text(json.dumps({"type": "FastVConfig", "config": {"prune_layers": [2], "retention": 0.5}}))
    with pytest.raises(ValueError, match="modes.json holds a FastVConfig, expected a MoDESConfig"):
        MoDESConfig.from_file(path)
    with pytest.raises(OSError):
        MoDESConfig.from_file(tmp_path / "none.json")


def test_special_tokens_are_words_of_the_model():
    model = tiny_internvl()
    words = model.get_input_embeddings().num_embeddings
    for token in (words, 10**30):
        with pytest.raises(ValueError, match=f"special_tokens: got {token}, expected ids of the model's {words} words"):
            fastmmoe.enable(model, skipping(special_tokens=(1, token)))
    assert "forward" not in vars(find_text_model(model)[1])
    fastmmoe.enable(model, skipping(special_tokens=(1, words - 1)))


def test_nothing_skipped_is_nothing_changed():
    model = tiny_internvl()
    batch = tiny_batch(model)
    with torch.no_grad():
        want = model(**batch).logits
        with fastmmoe.enabled(model, MoDESConfig()):
            assert torch.equal(model(**batch).logits, want)
        with fastmmoe.enabled(model, FastMMoEConfig(vision_top_k=2)):
            fewer = model(**batch).logits
        with fastmmoe.enabled(model, MoDESConfig(vision_top_k=2)):
            assert torch.equal(model(**batch).logits, fewer)
