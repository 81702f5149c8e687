"""Calibration: importances by hand, the walk along the frontier, and a file from which a stopped run goes on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText

import fastmmoe
from fastmmoe import MoDESConfig
from fastmmoe.calibration import calibrate as module
from fastmmoe.calibration.calibrate import calibrate
from fastmmoe.calibration.frontier import frontier, thresholds
from fastmmoe.calibration.importance import divergences, importances
from fastmmoe.calibration.samples import make_samples
from fastmmoe.families import find_text_model
from fastmmoe.families.chat import build_inputs, end_tokens, placeholders_of
from fastmmoe.families.processors import load_processor
from fastmmoe.study.questions import read_questions

from .test_cli import refused, succeed
from .tiny_checkpoints import save

NAMES = ("internvl_qwen3_moe", "qwen3_vl_moe", "glm4v_moe")


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request, tmp_path_factory):
    return save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    directory = tmp_path_factory.mktemp("questions")
    lines = []
    for number, answer in enumerate(("a cat", "two dogs and a bird", "no")):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40 + 8 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": f"What is in picture {number}?", "answer": answer})
    path = directory / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def loaded(checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return model, load_processor(str(checkpoint))


# --- importances ------------------------------------------------------------------------------------------------------


def by_hand(model, processor, example, special):
    """Divergences once more: the whole row of ids, position by position, a MoE's forward replaced token by token."""
    _, text, parent = find_text_model(model)
    inputs = dict(build_inputs(model, processor, [example.open_image()], example.question))
    answer = processor.tokenizer(example.answer, add_special_tokens=False)["input_ids"]
    answer += list(end_tokens(model, processor)[:1])
    shape = inputs["input_ids"].shape
    row = inputs["input_ids"][0].tolist() + answer
    for name, value in inputs.items():
        if value.shape == shape and name != "input_ids":
            tail = [1 if name == "attention_mask" else 0] * len(answer)
            inputs[name] = torch.tensor([value[0].tolist() + tail])
    inputs["input_ids"] = torch.tensor([row])
    image = parent.config.image_token_id
    kinds = ["vision" if token == image else "special" if token in special else "text" for token in row]

    def probabilities():
        logits = model(**inputs).logits[0].double()
        return [logits[place - 1].softmax(0) for place in range(len(row) - len(answer), len(row))]

    dense, found = probabilities(), {"text": {}, "vision": {}}
    for number, layer in enumerate(text.layers):
        if not hasattr(layer.mlp, "experts"):
            continue
        for kind in found:

            def left_out(hidden, *args, moe=layer.mlp, kind=kind, **kwargs):
                output = type(moe).forward(moe, hidden, *args, **kwargs)
                mixed = (output[0] if isinstance(output, tuple) else output).clone()
                for place, own in enumerate(kinds):
                    if own == kind:
                        mixed.view(hidden.shape)[0, place] = hidden[0, place]
                return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

            layer.mlp.forward = left_out
            moved = probabilities()
            del layer.mlp.forward
            sums = [float((p * (p / q).log()).sum()) for p, q in zip(dense, moved, strict=True)]
            found[kind][number] = sum(max(0.0, one) for one in sums)
    return found


@torch.no_grad()
def test_divergences_are_those_by_hand(checkpoint, questions):
    model, processor = loaded(checkpoint)
    examples = read_questions(questions)
    special = tuple(processor.tokenizer.all_special_ids)
    for example, sample in zip(examples, make_samples(model, processor, examples, special), strict=True):
        want, got = by_hand(model, processor, example, special), divergences(model, sample)
        for kind, layers in want.items():
            assert got[kind] == pytest.approx(layers, rel=1e-3, abs=1e-7)
        assert max(want["text"].values()) > 1e-6 and max(want["vision"].values()) > 1e-9


def test_importances_sum_to_one_over_the_layers():
    one, other = ({"text": {1: text, 3: 2.0}, "vision": {1: 0.0, 3: 0.5}} for text in (1.0, 3.0))
    found = importances([one, other], 4)
    assert found == {"text": (0.0, 0.5, 0.0, 0.5), "vision": (0.0, 0.0, 0.0, 1.0)}
    nothing = [{"text": {1: 1.0}, "vision": {1: 0.0}}]
    with pytest.raises(ValueError, match="no layer's vision experts"):
        importances(nothing, 4)


# --- the frontier -----------------------------------------------------------------------------------------------------


def test_thresholds():
    text, vision = thresholds("text"), thresholds("vision")
    assert len(text) == len(vision) == 100 and list(text) == sorted(text)
    assert text[0] == vision[0] == pytest.approx(2 / (1 + math.exp(10)))
    assert text[-1] == pytest.approx(2 / (1 + math.exp(2.9))) and vision[-1] == pytest.approx(2 / (1 + math.exp(4)))
    assert text[50] == pytest.approx(2 / (1 + math.exp(-10 * (50 * 0.71 / 99 - 1))))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_frontier_is_that_of_all_pairs(data):
    """Of any share that rises with both thresholds, every pair that is reached and has none below it that is."""
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    steps = np.array(data.draw(st.lists(st.integers(0, 2), min_size=rows * columns, max_size=rows * columns)))
    share = steps.reshape(rows, columns).cumsum(0).cumsum(1)
    target, asked = data.draw(st.integers(0, 12)), []

    def skipped(text, vision):
        asked.append((text, vision))
        return share[text, vision]

    found = frontier(range(rows), range(columns), skipped, target)
    reached = {(i, j) for i in range(rows) for j in range(columns) if share[i, j] >= target}
    least = {(i, j) for i, j in reached if (i - 1, j) not in reached and (i, j - 1) not in reached}
    assert set(found) == least and len(asked) <= rows + columns
    assert len(asked) == len(set(asked)) and found == sorted(found)


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_thresholds(monkeypatch):
    monkeypatch.setattr(module, "thresholds", lambda modality: thresholds(modality)[::20])


def test_a_calibration_skips_what_was_asked_for(checkpoint, questions, few_thresholds, tmp_path):
    model, processor = loaded(checkpoint)
    examples, path = read_questions(questions), tmp_path / "modes.json"
    work = calibrate(model, processor, examples, 0.3, path)
    assert MoDESConfig.from_file(path) == work.config and "forward" not in vars(find_text_model(model)[1])
    rows = json.loads(path.read_text())["calibration"]["evaluated"]
    assert work.chosen in rows and work.chosen["skipped"] >= 0.3
    reached = [row for row in rows if row["skipped"] >= 0.3]
    least = [
        row for row in reached
        if not any(other is not row and other["text_threshold"] <= row["text_threshold"]
                   and other["vision_threshold"] <= row["vision_threshold"] for other in reached)
    ]  # fmt: skip
    assert work.chosen["divergence"] == min(row["divergence"] for row in least)
    # what is reported of the pair is so, asked of the model as a user runs it
    skipped = total = 0
    with torch.no_grad(), fastmmoe.enabled(model, work.config):
        for sample in make_samples(model, processor, examples, work.config.special_tokens):
            inputs = sample.inputs
            if "inputs_embeds" in inputs:
                continue
            model(**inputs)
            report = fastmmoe.report(model)
            pairs = len(report.expert_pairs) * 4 * inputs["input_ids"].shape[1]
            skipped, total = skipped + report.experts_skipped * pairs, total + pairs
    assert not total or skipped / total == pytest.approx(work.chosen["skipped"])


def test_a_stopped_calibration_goes_on(checkpoint, questions, few_thresholds, tmp_path, monkeypatch):
    model, processor = loaded(checkpoint)
    examples, whole, parts = read_questions(questions), tmp_path / "whole.json", tmp_path / "parts.json"
    want = calibrate(model, processor, examples, 0.3, whole)
    done = []
    add = module.Calibration.add

    def stopping(self, step, value):
        add(self, step, value)
        done.append(step)
        if len(done) in (2, 5):
            raise KeyboardInterrupt

    monkeypatch.setattr(module.Calibration, "add", stopping)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, processor, examples, 0.3, parts, resume)
        with pytest.raises(ValueError, match="holds no calibration of"):
            MoDESConfig.from_file(parts)
    assert calibrate(model, processor, examples, 0.3, parts, True).config == want.config
    assert done.count("divergences") == len(examples)
    assert done.count("evaluated") == len(json.loads(whole.read_text())["calibration"]["evaluated"])
    done.clear()
    assert calibrate(model, processor, examples, 0.3, parts, True).config == want.config and not done
    for changed in (dict(target=0.4), dict(examples=examples[:2])):
        given = dict(examples=examples, target=0.3) | changed
        with pytest.raises(ValueError, match="another calibration"):
            calibrate(model, processor, path=parts, resume=True, **given)


def test_a_share_that_no_threshold_reaches(checkpoint, questions, few_thresholds, tmp_path):
    model, processor = loaded(checkpoint)
    with pytest.raises(ValueError, match=r"target: expected at most 0\.\d+, which the largest thresholds skip"):
        calibrate(model, processor, read_questions(questions), 0.9999, tmp_path / "modes.json")


def test_a_share_that_every_threshold_exceeds(checkpoint, questions, few_thresholds, tmp_path):
    model, processor = loaded(checkpoint)
    find = dict(model=model, processor=processor, examples=read_questions(questions))
    path = tmp_path / "modes.json"
    calibrate(**find, target=0.3, path=path)
    rows = json.loads(path.read_text())["calibration"]["evaluated"]
    least = min(rows, key=lambda row: (row["text_threshold"], row["vision_threshold"]))["skipped"]
    assert least > 1e-6
    with pytest.raises(ValueError, match=f"target: expected at least {least:.3f}, which the least thresholds skip"):
        calibrate(**find, target=1e-6, path=tmp_path / "less.json")


def test_another_models_steps_are_not_taken(checkpoint, questions, few_thresholds, tmp_path):
    """A model that was tuned on, with the same embeddings."""
    model, processor = loaded(checkpoint)
    find = dict(processor=processor, examples=read_questions(questions), target=0.3, path=tmp_path / "modes.json")
    calibrate(model, **find)
    family, text, _ = find_text_model(model)
    gate = family.gate_of(next(layer for layer in text.layers if family.is_moe(layer)))
    with torch.no_grad():
        next(gate.parameters()).mul_(1.01)
    with pytest.raises(ValueError, match="another calibration"):
        calibrate(model, **find, resume=True)


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_broken_model_is_refused(checkpoint, questions, tmp_path):
    model, processor = loaded(checkpoint)
    with torch.no_grad():
        model.get_output_embeddings().weight[0] = math.nan
    with pytest.raises(ValueError, match="model: its logits are not finite"):
        calibrate(model, processor, read_questions(questions, 1), 0.5, tmp_path / "modes.json")


def test_the_command(checkpoint, questions, few_thresholds, tmp_path):
    out = tmp_path / "modes.json"
    arguments = ["calibrate", "--model", checkpoint, "--data", questions, "--target", 0.3, "--out", out]
    figures = json.loads(succeed(*arguments, "--json"))
    assert MoDESConfig.from_dict(figures["config"]) == MoDESConfig.from_file(out)
    assert figures["chosen"]["skipped"] >= 0.3
    assert "skips" in succeed(*arguments, "--resume") and "--out" in refused(*arguments)


def test_damaged_steps_are_refused(checkpoint, questions, few_thresholds, tmp_path):
    model, processor = loaded(checkpoint)
    find = dict(processor=processor, examples=read_questions(questions), target=0.3, path=tmp_path / "modes.json")
    calibrate(model, **find)
    whole = json.loads(find["path"].read_text())

    def without_chosen(found):
        del found["calibration"]["chosen"]

    def of_a_word(found):
        modality = found["calibration"]["divergences"][1]["vision"]
        modality[next(iter(modality))] = "much"

    damages = (
        without_chosen,
        of_a_word,
        lambda found: found["calibration"]["divergences"].__setitem__(0, None),
        lambda found: found["calibration"]["divergences"].extend(found["calibration"]["divergences"]),
        lambda found: found["calibration"]["evaluated"][0].pop("skipped"),
    )
    for damage in damages:
        found = json.loads(json.dumps(whole))
        damage(found)
        find["path"].write_text(json.dumps(found))
        with pytest.raises(ValueError, match="modes.json: holds no calibration"):
            calibrate(model, **find, resume=True)
    find["path"].write_text(json.dumps(whole))
    calibrate(model, **find, resume=True)


@pytest.mark.parametrize(
    ("answer", "says"), [(" ", "line 2: expected an answer"), ("{0}", "line 2: answer: holds {0}")]
)
def test_answers_are_text(checkpoint, questions, tmp_path, answer, says):
    model, processor = loaded(checkpoint)
    placeholder = placeholders_of(model.config, processor)[0]
    lines = list(map(json.loads, questions.read_text().splitlines()))
    lines[1]["answer"] = answer.format(placeholder)
    path = questions.parent / "bad.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--model", checkpoint, "--data", path, "--target", 0.3, "--out", tmp_path / "modes.json"]
    assert says.format(placeholder) in refused("calibrate", *arguments)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--target": 1.0}, "--target 1.0: expected a share"),
        ({"--target": "nan"}, "--target nan: expected a share"),
        ({"--data": "none.jsonl"}, "none.jsonl: cannot be read"),
        ({"--model": "./none"}, "--model ./none: no such directory"),
        ({"--device": "tpu"}, "--device tpu"),
        ({"--out": "none/modes.json"}, "expected a file in a directory that exists"),
        ({"--n": 0}, "--n"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line(changes, says, questions, tmp_path):
    values = {"--data": questions, "--target": 0.3, "--out": tmp_path / "modes.json"} | changes
    assert says in refused("calibrate", *(part for pair in values.items() for part in pair))
    assert not (tmp_path / "modes.json").exists()
