"""Questions: scenes are the same every time, files are read as written, and what is wrong with them is said."""

import json

import numpy as np
import pytest
from PIL import Image

from fastmmoe.scenes import TYPES, generator, scene
from fastmmoe.study.questions import matches, read_questions, scene_questions


def test_scene_questions_are_reproducible_and_one_per_picture():
    first, again = scene_questions("dev", 15), scene_questions("dev", 15)
    assert [(e.question, e.answer, e.type) for e in first] == [(e.question, e.answer, e.type) for e in again]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert {example.type for example in first} <= set(TYPES) and len({example.type for example in first}) > 5
    for index in (0, 7):
        assert np.array_equal(first[index].open_image(), scene("dev", index).pixels)
        asked = TYPES[first[index].type](scene("dev", index), generator("dev", index, 2))
        assert asked is None or asked == (first[index].question, first[index].answer)


def test_scene_questions_differ_by_seed_and_split():
    asked = [[e.question for e in scene_questions(split, 12, seed)] for split, seed in (("dev", 0), ("dev", 1))]
    assert asked[0] != asked[1]
    assert [e.question for e in scene_questions("test", 12)] not in asked


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    return tmp_path


def write(folder, *lines):
    path = folder / "questions.jsonl"
    lines = (json.dumps(line) if isinstance(line, dict) else line for line in lines)
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_read_questions(folder):
    line = {"image": "red.png", "question": "Which colour?", "answer": "red"}
    path = write(folder, line, "", line | {"type": "colour"})
    first, second = read_questions(path)
    assert (first.question, first.answer, first.type, second.type) == ("Which colour?", "red", "", "colour")
    assert first.open_image().getpixel((0, 0)) == (255, 0, 0)
    assert len(read_questions(path, 1)) == 1


GOOD = {"image": "red.png", "question": "?", "answer": "a"}


def test_only_line_feeds_end_a_line(folder):
    """JSON may hold other line separators as they are; Windows' files have a carriage return before each."""
    question = "a line\u2028and another?"
    lines = json.dumps({"image": "red.png", "question": question, "answer": "x"}, ensure_ascii=False)
    (folder / "q.jsonl").write_text(f"{lines}\r\n\r\n{lines}\r\n", encoding="utf-8", newline="")
    assert [example.question for example in read_questions(folder / "q.jsonl")] == [question] * 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: no JSON"),
        ("[" * 100_000, "line 2: no JSON"),
        (b"\xff", "line 2: no UTF-8"),
        (GOOD | {"type": "\ud800"}, "line 2: expected type to be text in UTF-8"),
        ("[1]", "expected an object, got list"),
        ({"image": "red.png", "question": "?"}, "answer missing"),
        (GOOD | {"kind": "x"}, "unknown kind"),
        (GOOD | {"answer": 3}, "expected answer to be a string, got 3"),
        (GOOD | {"image": "blue.png"}, "no image .*blue.png"),
    ],
)
def test_read_questions_refuses(folder, line, said):
    with pytest.raises(ValueError, match=said):
        read_questions(write(folder, GOOD, line))


def test_read_questions_refuses_files(folder):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_questions(folder / "none.jsonl")
    with pytest.raises(ValueError, match="holds no question"):
        read_questions(write(folder, "", " "))


@pytest.mark.parametrize(
    ("said", "answer", "is_right"),
    [("Red", "red", True), (" 3  4 ", "3 4", True), ("Yes.", "yes", True), ("3 4", "4 3", False), ("", "no", False)],
)
def test_matches(said, answer, is_right):
    assert matches(said, answer) is is_right
