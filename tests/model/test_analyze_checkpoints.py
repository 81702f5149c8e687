"""`fastmmoe analyze` on checkpoints whose language models need more than embeddings, and on one that does not."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

import fastmmoe
from fastmmoe import FastMMoEConfig
from fastmmoe.families.chat import build_inputs, end_tokens
from fastmmoe.families.processors import load_processor
from fastmmoe.study.answers import answer, prefill
from fastmmoe.study.prompts import encode, make_batches
from fastmmoe.study.questions import read_questions

from .test_cli import succeed
from .tiny_checkpoints import save

NAMES = ("internvl_qwen3_moe", "qwen3_vl_moe", "glm4v_moe")
LAYERS = (2, 4)


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request, tmp_path_factory):
    return save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Five, about pictures of several sizes, so that batches have padding."""
    directory = tmp_path_factory.mktemp("questions")
    sizes = [(64, 40), (64, 40), (40, 40), (32, 64), (48, 32)]
    lines = []
    for number, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": f"What is in picture {number}?", "answer": "a cat"})
    path = directory / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("reduced", [False, True], ids=["dense", "pruned"])
@torch.no_grad()
def test_batched_answers_and_logits_are_those_of_one_question(checkpoint, questions, reduced):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = load_processor(str(checkpoint))
    config = FastMMoEConfig(prune_layers=LAYERS, retention=0.5, vision_top_k=2) if reduced else None
    end = end_tokens(model, processor)
    examples = read_questions(questions)
    batches = make_batches(encode(model, processor, examples), 3)
    assert [len(batch.numbers) for batch in batches] == [3, 2]
    assert any(batch.attention_mask is not None for batch in batches)
    for batch in batches:
        said = answer(model, batch, config, max_new_tokens=4, end=end)
        first = batch.first(1)
        fastmmoe.enable(model, config or FastMMoEConfig())
        logits, alone_logits = prefill(model, batch).logits, prefill(model, first).logits
        torch.testing.assert_close(logits[:1], alone_logits, rtol=0, atol=1e-4)
        for row, number in enumerate(batch.numbers):
            example = examples[number]
            inputs = build_inputs(model, processor, [example.open_image()], example.question)
            want = model(**inputs).logits[:, -1:]
            torch.testing.assert_close(logits[row : row + 1], want, rtol=0, atol=1e-4)
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=list(end))
            tokens = tokens[0, inputs["input_ids"].shape[1] :].tolist()
            assert said[row] == (tokens[: tokens.index(end[0])] if end[0] in tokens else tokens)
        fastmmoe.disable(model)


def test_analyze_writes_its_tables(checkpoint, questions, tmp_path):
    parts = ["--parts", "methods,routing,magnitude,budget", "--n", 2, "--batch", 2, "--max-new-tokens", 2]
    figures = json.loads(
        succeed("analyze", "--model", checkpoint, "--data", questions, "--out", tmp_path, *parts, "--json")
    )
    rows = figures["parts"]["methods"]
    assert len(rows) > 10 and all(row["n"] == 2 and 0 <= row["accuracy"] <= 1 for row in rows)
    assert {row["quantity"] for row in figures["parts"]["routing"]} == {"adjacent", "any pair", "entropy"}
    assert figures["parts"]["magnitude"]
    assert all(ratio > 0 for row in rows for ratio in row["time_ratio_predicted"].values())
    # gates that choose by groups allow no budget
    assert bool(figures["parts"]["budget"]) == (not checkpoint.name.startswith("glm4v_moe"))
