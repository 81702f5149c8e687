"""Scenes, questions and words, checked against what the pictures really show."""

import numpy as np
import pytest
import torch
from PIL import Image
from quality.processor import scene_processor

from fastmmoe.scenes import SPLITS, TYPES, ask, exact_match, generator, questions, scene
from fastmmoe.scenes.pictures import CELL, COLOURS, DIGIT_SAMPLES, GLYPH, PHOTOGRAPHS, SHAPES, SIZE, _samples
from fastmmoe.scenes.tokenizer import (
    SPECIAL_TOKENS,
    VISION_TOKENS,
    VOCABULARY,
    prompt,
    scene_tokenizer,
)


def test_splits_share_neither_digits_nor_photographs():
    samples = [set(_samples(split).tolist()) for split in SPLITS]
    assert sum(map(len, samples)) == len(set.union(*samples)) == 1797
    assert [len(some) for some in samples] == [high - low for low, high in DIGIT_SAMPLES.values()]
    photographs = [name for split in SPLITS for name in PHOTOGRAPHS[split]]
    assert len(photographs) == len(set(photographs))
    for split in SPLITS:
        for number in range(20):
            one = scene(split, number)
            assert one.photograph in PHOTOGRAPHS[split]
            assert {glyph.sample for glyph in one.digits} <= set(_samples(split).tolist())


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_is_the_same_on_every_call(split):
    one, again, other = scene(split, 5), scene(split, 5), scene(split, 6)
    assert one.glyphs == again.glyphs and np.array_equal(one.pixels, again.pixels)
    assert not np.array_equal(one.pixels, other.pixels)
    assert not np.array_equal(one.pixels, scene({"train": "dev", "dev": "test", "test": "train"}[split], 5).pixels)
    first, second = (questions(one, generator(split, 5, 1)) for _ in range(2))
    assert first == second


def test_a_picture_shows_its_glyphs():
    """Scans by their labels, shapes and colours by their pixels, all where the description says."""
    from sklearn.datasets import load_digits

    data = load_digits()
    for number in range(40):
        one = scene("train", number)
        assert one.pixels.shape == (SIZE, SIZE, 3) and one.pixels.dtype == np.uint8
        assert 3 <= len(one.digits) <= 7 and len(one.glyphs) - len(one.digits) <= 3
        assert len({(glyph.row, glyph.column) for glyph in one.glyphs}) == len(one.glyphs)
        assert list(one.glyphs) == sorted(one.glyphs, key=lambda glyph: (glyph.row, glyph.column))
        for glyph in one.glyphs:
            middle = glyph.top + GLYPH / 2, glyph.left + GLYPH / 2
            assert (int(middle[0] // CELL), int(middle[1] // CELL)) == (glyph.row, glyph.column)
            assert (int(middle[0] // GLYPH), int(middle[1] // GLYPH)) == divmod(glyph.token, SIZE // GLYPH)
            assert (glyph.digit is None) != (glyph.shape is None)
            assert glyph.shape in (None, *SHAPES)
            patch = one.pixels[glyph.top : glyph.top + GLYPH, glyph.left : glyph.left + GLYPH].astype(int)
            ink = 1 - np.abs(patch - COLOURS[glyph.colour]).max(-1) / 255
            assert (ink > 0.8).sum() >= 5
            if glyph.digit is not None:
                assert data.target[glyph.sample] == glyph.digit
                scan = data.images[glyph.sample]
                inked = np.asarray(Image.fromarray(ink.astype(np.float32)).resize((8, 8), Image.Resampling.BOX))
                assert np.corrcoef(inked.ravel(), scan.ravel())[0, 1] > 0.7


def _recompute(one, question):
    """The answer by a plain look at the picture's cells, written without the package's question code."""
    grid = {(f"r{g.row + 1}", f"c{g.column + 1}"): g for g in one.glyphs}
    digits = {place: g.digit for place, g in grid.items() if g.digit is not None}
    words = question.text.removesuffix(" ?").split()
    match words:
        case ["digit", "at", row, column]:
            return str(digits[row, column])
        case ["colour", "at", row, column]:
            return grid[row, column].colour
        case ["digits", "in", row]:
            return " ".join(str(digits[row, f"c{c}"]) for c in range(1, 6) if (row, f"c{c}") in digits) or "none"
        case ["larger", "of", row, column, "and", other_row, other_column]:
            return str(max(digits[row, column], digits[other_row, other_column]))
        case ["largest", "digit"]:
            return str(sorted(digits.values())[-1])
        case ["how", "many", "digits"]:
            return str(len(digits))
        case ["how", "many", "are", colour]:
            return str(sum(g.colour == colour for g in grid.values()))
        case ["is", "there", "a", digit]:
            return "yes" if int(digit) in digits.values() else "no"
        case [what, "of", digit]:
            (place,) = [place for place, value in digits.items() if value == int(digit)]  # stands there once
            return {"row": place[0], "column": place[1], "colour": grid[place].colour}[what]
    raise AssertionError(question)


def test_answers():
    seen = set()
    for number in range(150):
        one = scene("dev", number)
        for question in questions(one, generator("dev", number, 1)):
            assert question.answer == _recompute(one, question), question
            seen.add(question.type)
    assert seen == set(TYPES)


def test_empty_scenes_leave_out_what_they_cannot_answer():
    empty = scene("train", 0, digits=(0, 0), shapes=(0, 0))
    assert empty.glyphs == ()
    asked = {q.type: q for number in range(30) for q in questions(empty, generator("train", number, 1))}
    assert set(asked) == {"read row", "exists", "count", "count colour"}
    assert [asked[name].answer for name in asked] == ["none", "no", "0", "0"]
    one = scene("train", 1, digits=(1, 1), shapes=(0, 0))
    assert ask(one, "larger", generator("train", 1, 1)) is None


def test_exact_match():
    assert exact_match("3 7", "3 7") and exact_match(" Red ", "red")
    assert not exact_match("3", "3 7") and not exact_match("7 3", "3 7") and not exact_match("", "none")


@pytest.mark.parametrize(("split", "digits"), [("validation", (3, 7)), ("train", (20, 24))])
def test_refused(split, digits):
    with pytest.raises(ValueError, match="split|digits"):
        scene(split, 0, digits)


def test_words_round_trip():
    tokenizer = scene_tokenizer()
    for number in range(100):
        for question in questions(scene("dev", number), generator("dev", number, 1)):
            for text in (question.text, question.answer):
                ids = tokenizer(text).input_ids
                assert tokenizer.decode(ids) == text
                assert not {VOCABULARY[token] for token in SPECIAL_TOKENS} & set(ids)
    assert tokenizer("DIGIT at r2 c3?").input_ids == tokenizer("digit at r2 c3 ?").input_ids
    assert tokenizer("elephant").input_ids == [VOCABULARY["<unk>"]]
    assert len(tokenizer) == len(VOCABULARY)


def test_the_processor_gives_one_tile_of_any_picture():
    processor = scene_processor()
    one = scene("dev", 0)
    pictures = {"own": Image.fromarray(one.pixels), "large": Image.new("RGB", (640, 300), "red")}
    for name, picture in pictures.items():
        inputs = processor(images=picture, text=prompt("how many digits ?"), return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, SIZE, SIZE)
        assert (inputs["input_ids"] == VOCABULARY["<IMG_CONTEXT>"]).sum() == VISION_TOKENS
        if name == "own":
            expected = torch.from_numpy(one.pixels).permute(2, 0, 1) / 127.5 - 1
            torch.testing.assert_close(inputs["pixel_values"][0], expected, atol=1e-6, rtol=0)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many digits ?"}]}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == prompt("how many digits ?")
