"""Batches of conversations: answers are those of one at a time, costs those of the prefills that ran."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from model.tiny_checkpoints import save
from PIL import Image
from transformers import AutoModelForImageTextToText

import fastmmoe
from fastmmoe import FastMMoEConfig
from fastmmoe.families.processors import load_processor
from fastmmoe.harnesses.answers import Answerer

CONFIG = FastMMoEConfig(prune_layers=(2, 4), retention=0.5, vision_top_k=2)
NAMES = ("internvl_qwen3_moe", "qwen3_vl_moe", "glm4v_moe")


@pytest.fixture(scope="module", params=NAMES)
def loaded(request, tmp_path_factory):
    checkpoint = str(save(request.param, tmp_path_factory.mktemp(request.param)))
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    yield model, load_processor(checkpoint)
    fastmmoe.disable(model)


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def conversations() -> list:
    """One picture, two of them with words in between, none, and a turn that was answered before."""
    first, second, third = picture(0, 64, 40), picture(1, 40, 40), picture(2, 48, 32)

    def image(one):
        return {"type": "image", "image": one}

    def text(words):
        return {"type": "text", "text": words}

    return [
        [{"role": "user", "content": [image(first), text("What is it?")]}],
        [{"role": "user", "content": [image(second), text("and"), image(third), text("which one is the larger one?")]}],
        [{"role": "user", "content": [text("hello")]}],
        [
            {"role": "user", "content": [image(third), text("a cat?")]},
            {"role": "assistant", "content": [text("no")]},
            {"role": "user", "content": [text("why?")]},
        ],
    ]


@pytest.mark.parametrize("config", [None, CONFIG], ids=["dense", "reduced"])
def test_batches_answer_as_one_at_a_time(loaded, config):
    model, processor = loaded
    answerer = Answerer(model, processor)
    answerer.use(config)
    asked = conversations()
    said = answerer.answer(asked, max_new_tokens=4, do_sample=False)
    together = answerer.costs
    flops = dense = 0.0
    for one, answer in zip(asked, said, strict=True):
        inputs = processor.apply_chat_template(
            one, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer.text == processor.decode(tokens, skip_special_tokens=True)
        alone = Answerer(model, processor)
        assert alone.answer([one], max_new_tokens=4, do_sample=False) == [answer]
        flops, dense = flops + alone.costs.flops, dense + alone.costs.dense_flops
    assert (together.prompts, together.tokens) == (4, sum(answer.tokens for answer in said))
    assert together.flops == pytest.approx(flops) and together.dense_flops == pytest.approx(dense)
    assert (flops < 0.9 * dense) == (config is not None)
    assert 0 < together.prefill_seconds <= together.first_token_seconds <= together.seconds


def test_the_method_can_be_exchanged(loaded):
    model, processor = loaded
    answerer, asked = Answerer(model, processor), conversations()[:1]
    ratios = []
    for config in (CONFIG, None, FastMMoEConfig(vision_top_k=1), CONFIG):
        answerer.use(config)
        before = answerer.costs.flops, answerer.costs.dense_flops
        answerer.answer(asked, max_new_tokens=1, do_sample=False)
        ratios.append((answerer.costs.flops - before[0]) / (answerer.costs.dense_flops - before[1]))
    assert ratios[0] == pytest.approx(ratios[3]) and ratios[1] == 1.0 and ratios[2] < 1.0 != ratios[0]


@pytest.mark.parametrize("config", [None, CONFIG], ids=["dense", "reduced"])
def test_beams_are_counted(loaded, config):
    answerer, asked = Answerer(*loaded), conversations()[:1]
    answerer.use(config)
    answerer.answer(asked, max_new_tokens=2, do_sample=False)
    one = replace(answerer.costs)
    answerer.answer(asked, max_new_tokens=2, do_sample=False, num_beams=3)
    assert answerer.costs.flops - one.flops == pytest.approx(3 * one.flops)
    assert answerer.costs.dense_flops - one.dense_flops == pytest.approx(3 * one.dense_flops)
