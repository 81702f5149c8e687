"""DeepSeek-VL2's processor against the official one (golden data): tiles bit for bit, token ids, prompts."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from fastmmoe.families.processors import load_processor
from fastmmoe.models.deepseek_vl2 import DeepseekVLV2ImageProcessor, DeepseekVLV2Processor

from .golden import golden

GOLDEN = json.loads(golden("processor/processor.json").read_text())

# m x n tiles of 384 pixels, at most 9, in the official order
RESOLUTIONS = [
    [384 * m, 384 * n]
    for m, n in (
        *((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2), (1, 5), (5, 1), (1, 6), (6, 1)),
        *((2, 3), (3, 2), (1, 7), (7, 1), (1, 8), (8, 1), (2, 4), (4, 2), (1, 9), (9, 1), (3, 3)),
    )
]


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    red, green = x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1)
    return Image.fromarray(np.stack([red, green, (x + y) % 256], -1).astype(np.uint8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory with the processor's files as the official ones are."""
    directory = tmp_path_factory.mktemp("official")
    shutil.copy(golden("processor/stub_tokenizer.json"), directory / "tokenizer.json")
    tokenizer = {
        # the class official files name would replace the byte-level pre-tokenizer
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": "<｜begin▁of▁sentence｜>",
        "eos_token": "<｜end▁of▁sentence｜>",
        "pad_token": "<｜▁pad▁｜>",
        "add_bos_token": True,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    processor = {
        "processor_class": "DeepseekVLV2Processor",
        "candidate_resolutions": RESOLUTIONS,
        "patch_size": 14,
        "downsample_ratio": 2,
        "mask_prompt": False,
    }
    (directory / "processor_config.json").write_text(json.dumps(processor))
    (directory / "config.json").write_text(json.dumps({"model_type": "deepseek_vl_v2"}))
    return directory


@pytest.fixture(scope="module")
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


# ------------------------------------------------------------------------------------------------ tiles


def test_tiles_equal_the_official_ones_bit_for_bit(processor):
    tiles = np.load(golden("processor/tiles_uint8.npz"))["tiles"]
    vision = processor.image_processor(gradient(700, 500))
    want = (tiles.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)
    assert vision["images"].dtype == torch.float32
    assert np.array_equal(vision["images"][0].numpy(), want)
    assert hashlib.sha256(want.tobytes()).hexdigest() == GOLDEN["pixel_values_sha256"]
    assert vision["images_spatial_crop"].tolist() == [[[2, 2]]]


@pytest.mark.parametrize("case", GOLDEN["gradient_hashes"], ids=lambda case: "x".join(map(str, case["size_wh"])))
def test_tiles_of_other_sizes(processor, case):
    vision = processor.image_processor(gradient(*case["size_wh"]))
    uint8 = ((vision["images"][0] * 0.5 + 0.5) * 255).round().numpy().astype(np.uint8)
    assert list(uint8.shape) == case["tiles"]
    assert hashlib.sha256(uint8.tobytes()).hexdigest() == case["uint8_sha256"]
    assert vision["images_spatial_crop"].tolist() == [[case["spatial_crop"]]]
    assert processor.image_processor.num_image_tokens(*case["spatial_crop"]) == case["n_image_tokens"]


def test_choice_of_resolution(processor):
    choices = GOLDEN["select_best_resolution_w_h_bestw_besth"]
    assert len(choices) == 130
    for width, height, *best in choices:
        assert [*processor.image_processor.select_best_resolution(width, height)] == best, (width, height)


def test_more_than_two_images_are_not_tiled(processor):
    image = gradient(700, 500)
    crops = [processor.image_processor([image] * count)["images_spatial_crop"].tolist()[0] for count in (2, 3)]
    assert crops == [[[2, 2]] * 2, [[1, 1]] * 3]
    # counted per conversation, not per batch
    vision = processor.image_processor([[image, image], [image], []])
    assert vision["images_spatial_crop"].tolist() == [[[2, 2], [2, 2]], [[2, 2], [0, 0]], [[0, 0], [0, 0]]]
    assert vision["images"].shape == (3, 10, 3, 384, 384)
    assert vision["images"][1, 5:].eq(0).all() and vision["images"][2].eq(0).all()


def test_kinds_of_images(processor, tmp_path):
    image = gradient(50, 40)
    image.save(tmp_path / "image.png")
    want = processor.image_processor(image)["images"]
    for same in (np.asarray(image), str(tmp_path / "image.png"), image.convert("RGBA")):
        assert torch.equal(processor.image_processor(same)["images"], want)
    with pytest.raises(TypeError):
        processor.image_processor(3)
    with pytest.raises(ValueError, match="images: 1 x 2400 pixels are too narrow for 384 x 384"):
        processor.image_processor(gradient(1, 2400))
    with pytest.raises(TypeError, match="do_resize: no such option"):
        processor.image_processor(image, do_resize=False)
    with pytest.raises(ValueError, match="return_tensors: expected pt, got 'np'"):
        processor.image_processor(image, return_tensors="np")


def test_image_processor_saves_and_loads(processor, tmp_path):
    image_processor = DeepseekVLV2ImageProcessor([[32, 32], [64, 32]], patch_size=6, image_mean=(0.1, 0.2, 0.3))
    image_processor.save_pretrained(tmp_path)
    again = DeepseekVLV2ImageProcessor.from_pretrained(tmp_path)
    image = gradient(60, 30)
    assert torch.equal(again(image)["images"], image_processor(image)["images"])
    assert again.num_image_tokens(2, 1) == 12 + 1 + 21


# ------------------------------------------------------------------------------------------------ tokens and prompts


def test_token_ids_equal_the_official_ones(processor):
    prompt = processor.apply_chat_template(GOLDEN["conversation"])
    inputs = processor(images=[gradient(700, 500)], text=prompt)
    assert inputs["input_ids"].tolist() == [GOLDEN["input_ids"]]
    start, end = GOLDEN["images_seq_mask_true_range"]
    assert inputs["images_seq_mask"][0].nonzero().flatten().tolist() == list(range(start, end))
    assert inputs["images_seq_mask"].dtype == torch.bool
    assert inputs["attention_mask"].tolist() == [[1] * len(GOLDEN["input_ids"])]


@pytest.mark.parametrize("name", GOLDEN["prompts"])
def test_prompts_equal_the_official_ones(processor, name):
    want = GOLDEN["prompts"][name]
    prompt = processor.apply_chat_template(want["conversation"])
    assert prompt.replace("<image>", "") == want["text_of_input_ids"]
    images = [gradient(100, 100)] * prompt.count("<image>")
    inputs = processor(images=images or None, text=prompt)
    ids = inputs["input_ids"][0].tolist()
    assert len(ids) == want["n_tokens"] and int(inputs["images_seq_mask"].sum()) == want["n_image_tokens"]
    assert ids[: len(want["first_ids"])] == want["first_ids"] and ids[-len(want["last_ids"]) :] == want["last_ids"]
    assert inputs["images_spatial_crop"][0].tolist() == want["spatial_crop"]
    assert list(inputs["images"][0].shape) == want["images_shape"]


def test_messages_of_parts(processor):
    image = gradient(700, 500)
    message = {
        "role": "user",
        "content": [{"type": "image", "image": image}, {"type": "text", "text": "Describe this picture."}],
    }
    inputs = processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["input_ids"].tolist() == [GOLDEN["input_ids"]]
    assert inputs["images_spatial_crop"].tolist() == [[[2, 2]]]


def text(content: str) -> dict:
    return {"type": "text", "text": content}


@pytest.mark.parametrize(
    ("content", "rendered"),
    [
        (" Hi\n", "Hi"),
        ([text("Look: "), {"type": "image"}], "Look: <image>"),
        ([{"type": "image"}, {"type": "image"}, text("Same?")], "<image>\n<image>\nSame?"),
        # text that brings its own white space gets no more
        (
            [text("First "), {"type": "image"}, text(" then "), {"type": "image"}, text("\nGo.")],
            "First <image> then <image>\nGo.",
        ),
    ],
)
def test_content(processor, content, rendered):
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt == f"<｜begin▁of▁sentence｜><|User|>: {rendered}\n\n<|Assistant|>:"


@pytest.mark.parametrize(
    "messages", [[{"role": "tool", "content": "x"}], [{"role": "user", "content": [{"type": "video"}]}]], ids=str
)
def test_messages_that_the_template_refuses(processor, messages):
    with pytest.raises(Exception, match=r"role: expected user|content: expected parts"):
        processor.apply_chat_template(messages)


def test_a_bare_prompt_gets_the_bos_token(processor):
    image = gradient(10, 10)
    first = processor(images=image, text="<image>Hi")["input_ids"][0]
    assert first[0] == 0 and first[1] == 259 and len(first) == 1 + 421 + 2
    assert processor(images=image, text="<image>Hi", add_special_tokens=False)["input_ids"][0, 0] == 259


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded(processor, side):
    texts = ["<image>One", "No picture", "<image> and <image>"]
    images = [[gradient(384, 384)], [], [gradient(100, 333), gradient(700, 500)]]
    batch = processor(images=images, text=texts, padding_side=side)
    for number, (sample, sample_images) in enumerate(zip(texts, images, strict=True)):
        alone = processor(images=[sample_images], text=sample)
        valid = batch["attention_mask"][number].bool()
        n = alone["input_ids"].shape[1]
        assert valid.sum() == n and (valid[-n:] if side == "left" else valid[:n]).all()
        assert batch["input_ids"][number][~valid].eq(2).all()
        for name in ("input_ids", "images_seq_mask"):
            assert torch.equal(batch[name][number][valid], alone[name][0])
        assert not batch["images_seq_mask"][number][~valid].any()
        for name in ("images", "images_spatial_crop"):
            assert torch.equal(batch[name][number, : alone[name].shape[1]], alone[name][0])
            assert batch[name][number, alone[name].shape[1] :].eq(0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(images=gradient(9, 9)), "text: expected text"),
        (dict(text="x", videos=[1]), "text: expected text"),
        (dict(text="<image>x"), "text 0 has 1 <image> placeholders, got 0 images"),
        (dict(text="x", images=gradient(9, 9)), "text 0 has 0 <image> placeholders, got 1 images"),
        (dict(text=["x", "y"], images=[gradient(9, 9)]), "expected a list of 2 lists"),
        (dict(text=["x"], images=[[], []]), "expected 1 lists like text, got 2"),
        (dict(text="x", padding="max_length"), "padding: expected True or longest"),
        (dict(text="x", padding_side="top"), "padding_side: expected left or right"),
    ],
)
def test_calls_that_do_not_fit(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


# ------------------------------------------------------------------------------------------------ files


def test_saved_files_are_official_and_load_again(processor, checkpoint, tmp_path):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert json.loads((checkpoint / "processor_config.json").read_text()).items() <= saved.items()
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, DeepseekVLV2Processor)
    image = gradient(700, 500)
    prompt = again.apply_chat_template(GOLDEN["conversation"])
    assert again(images=image, text=prompt)["input_ids"].tolist() == [GOLDEN["input_ids"]]
    assert again.decode(GOLDEN["input_ids"][-2:]) == "<|Assistant|>:"


def test_tokens_that_the_tokenizer_lacks_are_added(checkpoint, tmp_path):
    """Numbered in the official order behind the vocabulary; end and padding have their official names."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < 3]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "DeepseekVLV2Processor"}))
    processor = AutoProcessor.from_pretrained(tmp_path)
    for token, number in GOLDEN["special_token_ids"].items():
        assert processor.tokenizer.convert_tokens_to_ids(token) == number
    assert (processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id) == (0, 1)
    assert processor.tokenizer.pad_token_id == 2


def test_load_processor_knows_it(checkpoint):
    assert isinstance(load_processor(str(checkpoint)), DeepseekVLV2Processor)
    assert AutoConfig.from_pretrained(checkpoint).model_type == "deepseek_vl_v2"


def test_deepseek_ocr_is_refused(checkpoint, tmp_path):
    """Its processor goes by the same class name."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    config = {"model_type": "deepseek_vl_v2", "vision_config": {"model_name": "deeplip_b_l"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="such as DeepSeek-OCR, which is not supported"):
        AutoProcessor.from_pretrained(tmp_path)


def test_another_prompt_format_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"processor_class": "DeepseekVLV2Processor", "sft_format": "plain"})
    )
    with pytest.raises(ValueError, match="sft_format: expected deepseek, got 'plain'"):
        AutoProcessor.from_pretrained(tmp_path)
