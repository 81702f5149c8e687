"""The random model and its processor: the real tiling, the real number of tokens, a tokenizer that loses nothing."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from fastmmoe.families.chat import build_inputs
from fastmmoe.families.internvl_random import random_model, random_processor, save_random_model
from fastmmoe.families.processors import load_processor
from fastmmoe_cli.bench import PROMPT, cat_photograph

TOKENS = 256  # per tile: 448 / 14 patches a side, 2 x 2 of them joined


@pytest.fixture(scope="module")
def processor():
    return random_processor()


@pytest.fixture(scope="module")
def model():
    return random_model()


def chat(images, prompt):
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]


def test_the_photograph_is_seven_tiles():
    photograph = cat_photograph()
    assert (photograph.mode, photograph.size) == ("RGB", (451, 300))
    # a photograph, not a placeholder
    assert len(np.unique(np.asarray(photograph).reshape(-1, 3), axis=0)) > 10_000


@pytest.mark.parametrize(
    ("width", "height", "tiles"),
    [
        (451, 300, 3 * 2 + 1),  # the photograph
        (448, 448, 1),  # one tile needs no thumbnail
        (896, 448, 2 + 1),
        (448, 1344, 3 + 1),
        (5000, 400, 12 + 1),  # the largest number of tiles
    ],
    ids=lambda value: str(value),
)
def test_image_tokens_are_tiles_times_256(model, processor, width, height, tiles):
    inputs = build_inputs(model, processor, [Image.new("RGB", (width, height))], "?")
    assert inputs["pixel_values"].shape == (tiles, 3, 448, 448)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == tiles * TOKENS


def test_tiles_go_row_by_row_and_the_thumbnail_comes_last(processor):
    rows, columns = 2, 3
    greys = np.arange(1, 7, dtype=np.uint8).reshape(rows, columns) * 40
    pixels = np.kron(greys, np.ones((448, 448), np.uint8))
    image = Image.fromarray(np.stack([pixels] * 3, -1))
    values = processor(images=[image], text="<IMG_CONTEXT>", return_tensors="pt")["pixel_values"]
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    seen = (values * std + mean) * 255
    for tile, grey in zip(seen, greys.ravel(), strict=False):
        torch.testing.assert_close(tile, torch.full_like(tile, float(grey)), atol=0.01, rtol=0)
    # the thumbnail shows the tiles where they are; away from their borders resampling changes nothing
    for row in range(rows):
        for column in range(columns):
            pixel = seen[-1, :, 112 + 224 * row, 75 + 149 * column]
            torch.testing.assert_close(pixel, torch.full_like(pixel, float(greys[row, column])), atol=1.0, rtol=0)


@pytest.mark.parametrize("prompt", ["What is it?", "  two  spaces,\n\ta tab", "naïve 猫 🐈 <img"], ids=ascii)
def test_chat_template_round_trip(model, processor, prompt):
    images = [Image.new("RGB", (448, 448)), Image.new("RGB", (896, 448))]
    inputs = build_inputs(model, processor, images, prompt)
    expected = (
        "<|im_start|>user\n"
        + f"<img>{'<IMG_CONTEXT>' * TOKENS}</img>\n"
        + f"<img>{'<IMG_CONTEXT>' * 3 * TOKENS}</img>\n"
        + f"{prompt}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert processor.decode(inputs["input_ids"][0]) == expected


def test_conversations_of_plain_text_too(processor):
    turns = [{"role": "system", "content": "Be brief."}, *chat([], "Hi"), {"role": "assistant", "content": "Hello"}]
    assert processor.apply_chat_template(turns) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n"
    )


def test_equal_seeds_give_equal_models_and_leave_the_callers_random_state(model):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    again, other = random_model(), random_model(seed=1)
    torch.testing.assert_close(torch.rand(4), expected, atol=0, rtol=0)
    gate = model.model.language_model.layers[7].mlp.gate.weight
    torch.testing.assert_close(again.model.language_model.layers[7].mlp.gate.weight, gate, atol=0, rtol=0)
    assert not torch.equal(other.model.language_model.layers[7].mlp.gate.weight, gate)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_routing_and_attention_are_far_from_uniform(model, processor):
    """A uniform router would make every token's window alike; uniform attention, every token as important."""
    # one tile, to save time
    inputs = build_inputs(model, processor, [cat_photograph().resize((448, 448))], PROMPT)
    vision = inputs["input_ids"][0] == model.config.image_token_id
    layers = model.model.language_model.layers
    logits, rows = {}, {}
    handles = [
        layers[layer].mlp.gate.register_forward_hook(lambda _, __, out, layer=layer: logits.update({layer: out[0]}))
        for layer in (5, 8, 12)
    ]
    model.set_attn_implementation({"text_config": "eager"})
    handles += [
        layers[layer].self_attn.register_forward_hook(
            lambda _, __, out, layer=layer: rows.update({layer: out[1][0, :, -1].mean(0)})
        )
        for layer in (5, 8, 12)
    ]
    try:
        with torch.inference_mode():
            model(**inputs, logits_to_keep=1)
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})
        for handle in handles:
            handle.remove()
    for layer in (5, 8, 12):
        probs = logits[layer].float().softmax(-1)[vision]
        entropy = -(probs * probs.log()).sum(-1).mean()
        assert entropy < 0.8 * np.log(16), layer
        # not the same experts for every token either
        mean = probs.mean(0)
        assert -(mean * mean.log()).sum() > entropy + 0.1, layer
        row = rows[layer][vision]
        assert row.max() > 4 * row.mean(), layer


def test_a_saved_model_is_an_ordinary_checkpoint(model, processor, tmp_path):
    directory = save_random_model(tmp_path / "model")
    loaded, its_processor = AutoModelForImageTextToText.from_pretrained(directory), load_processor(str(directory))
    photograph = cat_photograph().resize((400, 420))
    inputs = build_inputs(model, processor, [photograph], PROMPT)
    again = build_inputs(loaded, its_processor, [photograph], PROMPT)
    assert set(again) == set(inputs)
    torch.testing.assert_close(again["input_ids"], inputs["input_ids"])
    # with torchvision its own resampling serves, which rounds otherwise
    torch.testing.assert_close(again["pixel_values"], inputs["pixel_values"], atol=0.05, rtol=0)
    with torch.inference_mode():
        expected, found = (m(**inputs, logits_to_keep=1).logits for m in (model, loaded))
    torch.testing.assert_close(found, expected)
    assert loaded.generation_config.suppress_tokens == model.generation_config.suppress_tokens
