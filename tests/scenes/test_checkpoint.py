"""The model that ships: it loads as a user loads it and answers as well as its card says."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from quality.evaluate import evaluate_generated, evaluate_packed, summarise
from transformers import AutoModelForImageTextToText

from fastmmoe.families.processors import load_processor
from fastmmoe.scenes import CHECKPOINT, EXAMPLE, exact_match, generator, questions, scene
from fastmmoe.scenes.tokenizer import prompt

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "quality"


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def test_files():
    names = {file.name for file in CHECKPOINT.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert "processor_config.json" in names
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 8e6
    assert AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype="auto").dtype == torch.float16


def test_accuracy_is_what_the_card_says(model):
    said = json.loads((RESULTS / "test.json").read_text())["exact_match"]["overall"]
    assert said["n"] >= 2000 and said["accuracy"] >= 0.9
    got = summarise(evaluate_packed(model, "test", 0, 20))["overall"]
    error = said["standard_error"] * (said["n"] / got["n"]) ** 0.5
    assert got["n"] > 200
    assert abs(got["accuracy"] - said["accuracy"]) < 4 * error
    assert f"| overall |  | {said['accuracy']:.3f} |" in (CHECKPOINT / "README.md").read_text()


def test_one_question_at_a_time_is_answered_as_the_packed_evaluation_says(model):
    packed, generated = evaluate_packed(model, "test", 20, 4), evaluate_generated(model, "test", 20, 4)
    assert [record[:2] for record in packed] == [record[:2] for record in generated]
    differ = sum(one != other for one, other in zip(packed, generated, strict=True))
    assert differ <= 1  # two words may be equally likely but for rounding


def test_the_example_is_a_test_scene_and_is_answered(model):
    one = scene("test", 0)
    picture = Image.open(EXAMPLE / "picture.png")
    assert picture.tobytes() == one.pixels.tobytes()
    asked = json.loads((EXAMPLE / "questions.json").read_text())
    assert asked == [vars(question) for question in questions(one, generator("test", 0, 1))]
    processor = load_processor(str(CHECKPOINT))
    # a batch, padded on the left
    inputs = processor(
        images=[picture] * len(asked), text=[prompt(q["text"]) for q in asked], return_tensors="pt", padding=True
    )
    ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    said = processor.batch_decode(ids, skip_special_tokens=True)
    assert sum(exact_match(words, q["answer"]) for words, q in zip(said, asked, strict=True)) >= 0.7 * len(asked)
