"""What the training computes: its experts, its optimiser, its packed sequences, and that it can be interrupted."""

import json

import pytest
import torch
from quality import schedule
from quality.batches import PREFIX, pack, to_pixels, token_labels
from quality.dispatch import sorted_experts
from quality.evaluate import answer_logits, evaluate_generated, evaluate_packed, summarise
from quality.model import new_model
from quality.muon import Muon, orthogonalise
from quality.scoring import IGNORE
from quality.train import Settings, train
from safetensors.torch import load_file

from fastmmoe.scenes import generator, questions, scene


@pytest.fixture(scope="module")
def model():
    return new_model(0).eval()


def test_experts_and_their_gradients_are_those_of_transformers(model):
    experts = model.model.language_model.layers[0].mlp.experts
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 96, generator=draw, requires_grad=True)
    # the last two experts have no token
    ids = torch.stack([torch.randperm(14, generator=draw)[:4] for _ in range(37)])
    weights = torch.rand(37, 4, generator=draw, requires_grad=True)
    leaves = [hidden, weights, experts.gate_up_proj, experts.down_proj]
    want = experts(hidden, ids, weights)
    got = sorted_experts(experts, hidden, ids, weights)
    torch.testing.assert_close(got, want)
    direction = torch.randn(want.shape, generator=draw)
    for one, other in zip(
        torch.autograd.grad(got, leaves, direction), torch.autograd.grad(want, leaves, direction), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_orthogonalise():
    """Singular vectors stay, singular values come near 1."""
    matrices = torch.randn(5, 8, 12, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = u.mT @ orthogonalise(matrices) @ vh.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    torch.testing.assert_close(values, torch.diag_embed(diagonal), atol=1e-3, rtol=0)


def test_muon_takes_the_matrices_of_a_parameter_apart(one_process):
    """Gate and up lie in one tensor, experts in another dimension: the same as one parameter each."""
    draw = torch.Generator().manual_seed(0)
    start, gradient = torch.zeros(3, 8, 6), torch.randn(3, 8, 6, generator=draw)
    together = start.clone().requires_grad_()
    apart = [start[e, half : half + 4].clone().requires_grad_() for e in range(3) for half in (0, 4)]
    together.grad = gradient.clone()
    for number, parameter in enumerate(apart):
        parameter.grad = gradient[number // 2, 4 * (number % 2) :][:4].clone()
    Muon([together], 0.1, [2]).step()
    Muon(apart, 0.1, [1] * 6).step()
    torch.testing.assert_close(together, torch.stack(apart).view(3, 8, 6))
    tall = torch.zeros(9, 4, requires_grad=True)
    tall.grad = torch.randn(9, 4, generator=draw)
    Muon([tall], 0.1, [1]).step()
    assert ((tall.grad * tall.detach()).sum() < 0) and tall.shape == (9, 4)


def test_a_packed_question_sees_its_picture_and_itself(model):
    """Logits of packed questions are those of a sequence with one question, without mask or positions."""
    scenes = [scene("dev", number) for number in range(3)]
    asked = [questions(one, generator("dev", number, 1))[: 9 - number] for number, one in enumerate(scenes)]
    batch = pack(scenes, asked)
    with torch.inference_mode():
        features = model.model.get_image_features(batch.pixels).pooler_output
        got = answer_logits(model, features, batch)[0]
        owner = batch.owner[batch.labels != IGNORE]
        number = 0
        for one, some in zip(scenes, asked, strict=True):
            for question in some:
                single = pack([one], [[question]])
                count = int((single.labels != IGNORE).sum())
                logits = model(input_ids=single.ids, pixel_values=to_pixels([one])).logits[0, -count:]
                torch.testing.assert_close(got[owner == number], logits, atol=1e-4, rtol=1e-4)
                assert single.labels[0, -count:].tolist()[-1] == model.generation_config.eos_token_id
                number += 1
    assert number == len(batch.types) and (batch.labels[:, : PREFIX - 1] == IGNORE).all()


def test_packed_and_generated_answers_agree(model):
    packed, generated = evaluate_packed(model, "dev", 0, 2), evaluate_generated(model, "dev", 0, 2)
    assert packed == generated


def test_standard_error_by_hand():
    """Two scenes of two questions, one all right and one all wrong: an error of 1/2 per scene and side."""
    records = [(0, "read", True), (0, "count", True), (1, "read", False), (1, "count", False)]
    overall = summarise(records)["overall"]
    assert overall == {"accuracy": 0.5, "standard_error": round((1 + 1) ** 0.5 / 4, 4), "n": 4}
    assert summarise(records)["read"]["n"] == 2


def test_token_labels():
    one = scene("train", 3)
    labels = token_labels([one])[0]
    assert labels[:, 0].ne(11).sum() == len(one.glyphs) == labels[:, 1].ne(6).sum()
    for glyph in one.glyphs:
        content, _, row, column = labels[glyph.token].tolist()
        assert content == (10 if glyph.digit is None else glyph.digit)
        assert (row, column) == (glyph.row, glyph.column)


def test_schedule():
    rates = [schedule.rate(step, 1000, 0.4) for step in range(1000)]
    assert rates[0] == 1 / schedule.WARMUP and max(rates) == 1 and rates[-1] < 0.01
    assert rates[400] == pytest.approx(1) and rates[700] == pytest.approx(0.5)
    assert [schedule.digits(step) for step in (0, 300, 1000)] == [(1, 3), (2, 5), (3, 7)]
    assert [schedule.pictures(step, 100, 16) for step in (0, 89, 90, 99)] == [8, 8, 16, 16]


@pytest.fixture
def settings_of_torch():
    """A training sets these for its whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(tmp_path, settings_of_torch):
    """Four steps at once, and the same four with a stop in each phase: equal weights, bit by bit."""
    settings = Settings(processes=1, vision_steps=2, steps=2, vision_batch=4, batch=2, questions=4)
    options = {"dev_every": 2, "dev_scenes": 1, "save_every": 1}
    (tmp_path / "once").mkdir()
    train(0, settings, tmp_path / "once", None, False, options)
    (tmp_path / "parts").mkdir()
    for resume in (False, True, True, True):
        assert not (tmp_path / "parts/checkpoint").exists()
        train(0, settings, tmp_path / "parts", 0, resume, options)  # no minutes: one step
    train(0, settings, tmp_path / "parts", None, True, options)
    once, parts = (load_file(tmp_path / name / "checkpoint/model.safetensors") for name in ("once", "parts"))
    assert once.keys() == parts.keys()
    assert all(torch.equal(once[name], parts[name]) for name in once)
    log = json.loads((tmp_path / "parts/training.json").read_text())["log"]
    assert [(entry["phase"], entry["step"]) for entry in log if "settings" in entry] == [
        (1, 0), (1, 1), (1, 2), (2, 1), (2, 2),
    ]  # fmt: skip
