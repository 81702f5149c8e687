"""The pages' data: splits, layouts, pictures, and answers recomputed from what stands in the cells alone."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages.fonts import FONTS
from pages.layout import BAR, generator, page, syllables
from pages.model import TOKEN
from pages.questions import GROUPS, TYPES, ask, group_of, types_of
from pages.render import render
from pages.words import (
    FIRST,
    KINDS,
    SECOND,
    SIDE,
    SPLITS,
    VOCABULARY,
    WORDS,
    halves,
    made_up,
    page_tokenizer,
    token_ids,
    words,
)
from pages.write import question_about

pages = st.builds(
    lambda split, index, side, pool: (split, index, page(split, index, side, pool)),
    st.sampled_from(SPLITS), st.integers(0, 2**40), st.sampled_from([8, 12, SIDE]), st.sampled_from([None, made_up()]),
)  # fmt: skip


def test_no_word_and_no_font_is_in_two_splits():
    assert sorted(word for split in SPLITS for word in words(split)) == sorted(set(WORDS))
    styles = [style for split in SPLITS for style in FONTS[split]]
    assert len(styles) == len(set(styles))
    families = [{file.split("-")[0].split(".")[0] for _, file in FONTS[split]} for split in SPLITS]
    assert not families[0] & families[1] and not families[0] & families[2] and not families[1] & families[2]
    assert len(words("dev")) > 40 and len(words("test")) > 60


def test_made_up_words_are_many_and_none_is_held_out():
    assert not {*made_up()} & {*words("dev"), *words("test")} and {*words("train")} < {*made_up()}
    with_keywords = 17  # begin with "has", "sum" or "yes"
    assert len(made_up()) == len(FIRST) * len(SECOND) - len(words("dev")) - len(words("test")) - with_keywords
    shown = [text for index in range(40) for text in page("train", index, SIDE, made_up()).cells.values()]
    assert sum(text not in WORDS for text in shown if text.isalpha()) > 100


def test_halves_of_held_out_words_are_known():
    counts = Counter(half for word in words("train") for half in halves(word))
    assert all(counts[half] >= 4 for split in ("dev", "test") for word in words(split) for half in halves(word))


def test_the_vocabulary_has_no_holes_and_no_prefix_that_swallows_a_word():
    assert sorted(VOCABULARY.values()) == list(range(len(VOCABULARY)))
    tokenizer = page_tokenizer()
    for text in (*WORDS, *map(str, range(1000)), *(f"r{n} c{n}" for n in range(1, SIDE + 1))):
        assert tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) == token_ids(text)
        assert tokenizer.decode(token_ids(text)) == text


@settings(max_examples=60, deadline=None)
@given(pages, st.integers(0, 1000))
def test_questions_are_in_the_tokenizers_words(drawn, seed):
    split, index, one = drawn
    tokenizer = page_tokenizer()
    for name in types_of(one.kind):
        if question := ask(one, name, generator(split, index, seed)):
            for text in (question.text, question.answer):
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert tuple(ids) == token_ids(text) and VOCABULARY["<unk>"] not in ids
            assert len(token_ids(question.answer)) <= 4


def test_the_tokenizer_knows_every_word_there_may_be():
    tokenizer = page_tokenizer()
    for word in (*words("train"), *words("dev"), *words("test"), *made_up()):
        assert tuple(tokenizer(word, add_special_tokens=False)["input_ids"]) == token_ids(word)


@settings(max_examples=100, deadline=None)
@given(pages)
def test_layout(drawn):
    split, index, one = drawn
    choices = product((8, 12, SIDE), (words(split), made_up()))
    side, pool = next(choice for choice in choices if page(split, index, *choice) == one)
    assert all(0 <= row < side and 0 <= column < side for row, column in one.cells)
    assert all(text == BAR or text.isdigit() or text in pool for text in one.cells.values())
    assert one.kind == KINDS[index % len(KINDS)]


def _grid(one):
    """Rows of (column, text), from top to bottom, left to right; knows nothing of a page's meaning."""
    rows = sorted({row for row, _ in one.cells})
    return [sorted((column, text) for (r, column), text in one.cells.items() if r == row) for row in rows]


def _answer(one, text):
    """What is right, read off the grid as a person would; None for a question it does not know."""
    words_, grid = text.split(), _grid(one)
    flat = [(r, c, t) for (r, c), t in sorted(one.cells.items())]
    match words_:
        case ["at", row, column]:
            return one.cells[int(row[1:]) - 1, int(column[1:]) - 1]
        case ["where", "is", word]:
            (place,) = [(r, c) for r, c, t in flat if t == word]
            return f"r{place[0] + 1} c{place[1] + 1}"
        case ["is", "there", word]:
            return "yes" if any(t == word for *_, t in flat) else "no"
        case ["times", word]:
            return str(sum(t == word for *_, t in flat))
        case ["kind"]:
            if any(t == BAR for *_, t in flat):
                return "chart"
            last = grid[-1]
            if len(last) == 1 and int(last[0][1]) == sum(int(row[2][1]) for row in grid[1:-1]):
                return "receipt"
            return "table" if grid[0][0][0] > grid[1][0][0] else "text"  # nothing stands above the labels
        case ["after", word]:
            ((row, column),) = [(r, c) for r, c, t in flat if t == word]
            return one.cells[row, column + 1]
        case ["below", word]:
            ((row, column),) = [(r, c) for r, c, t in flat if t == word]
            return next(t for r, c, t in flat if c == column and r > row)
        case ["number", "of", "lines"]:
            return str(len(grid))
        case ["number", "of", "columns"]:
            return str(len(grid[0]))
        case ["number", "of", what]:
            return str(len(grid) - {"rows": 1, "items": 2, "bars": 0}[what])
        case ["column", "after", word]:
            header = [t for _, t in grid[0]]
            return header[header.index(word) + 1]
        case [header, "of", word] if one.kind == "table":
            column = next(c for c, t in grid[0] if t == header)
            return next(dict(row)[column] for row in grid[1:] if row[0][1] == word)
        case ["which", "has", number, "in", header]:
            column = next(c for c, t in grid[0] if t == header)
            return next(row[0][1] for row in grid[1:] if dict(row)[column] == number)
        case [header, "larger", word, "or", other]:
            column = next(c for c, t in grid[0] if t == header)
            return max((word, other), key=lambda w: int(next(dict(r)[column] for r in grid if r[0][1] == w)))
        case ["max", header]:
            column = next(c for c, t in grid[0] if t == header)
            return max(grid[1:], key=lambda row: int(dict(row)[column]))[0][1]
        case ["price", "of", word]:
            return next(row[2][1] for row in grid if row[0][1] == word)
        case ["quantity", "of", word]:
            return next(row[1][1] for row in grid if row[0][1] == word)
        case ["total"]:
            assert int(grid[-1][0][1]) == sum(int(row[2][1]) for row in grid[1:-1])
            return grid[-1][0][1]
        case ["dearer", word, "or", other]:
            return max((word, other), key=lambda w: int(next(row[2][1] for row in grid[1:-1] if row[0][1] == w)))
        case ["dearest"]:
            return max(grid[1:-1], key=lambda row: int(row[2][1]))[0][1]
        case ["sum", word, "and", other]:
            return str(sum(int(row[1][1]) for row in grid[1:-1] if row[0][1] in (word, other)))
        case ["length", "of", word]:
            return str(next(len(row) - 1 for row in grid if row[0][1] == word))
        case ["longer", word, "or", other]:
            return max((word, other), key=lambda w: next(len(row) for row in grid if row[0][1] == w))
        case ["longest"]:
            return max(grid, key=len)[0][1]
        case ["number", "above", least]:
            return str(sum(len(row) - 1 > int(least) for row in grid))
        case [("first" | "last") as which, "item"]:
            entries = grid[1:-1] if one.kind == "receipt" else grid
            return entries[0 if which == "first" else -1][0][1]
    return None


@settings(max_examples=150, deadline=None)
@given(pages, st.integers(0, 1000))
def test_answers_can_be_read_off_the_cells(drawn, seed):
    split, index, one = drawn
    for name in types_of(one.kind):
        if question := ask(one, name, generator(split, index, 10 + seed)):
            assert question.answer == _answer(one, question.text), (name, question)


def test_every_type_is_asked_and_in_one_group():
    asked = {question_about("test", number, number // len(KINDS)).type for number in range(400)}
    assert asked == set(TYPES)
    assert sorted(name for types in GROUPS.values() for name in types) == sorted(TYPES)
    assert group_of("where") == "layout"


def test_one_question_about_a_page_is_the_same_on_every_call():
    assert question_about("test", 17, 3) == question_about("test", 17, 3)


@pytest.mark.parametrize("index", range(8))
def test_ink_stands_in_its_cells_alone(index):
    """A vision token of an empty cell shows paper and noise; one of a full cell more."""
    one = page("test", index)
    pixels = render(one, "test", index)
    assert pixels.dtype == np.uint8 and pixels.shape == (SIDE * TOKEN, SIDE * TOKEN, 3)
    np.testing.assert_array_equal(pixels, render(one, "test", index))
    cells = pixels.astype(float).mean(-1).reshape(SIDE, TOKEN, SIDE, TOKEN).transpose(0, 2, 1, 3)
    inner = cells[:, :, 2:-2, 2:-2].reshape(SIDE, SIDE, -1)  # rules and blur touch the border
    spread = np.ptp(inner, -1)
    full = np.zeros((SIDE, SIDE), bool)
    full[tuple(np.array(list(one.cells)).T)] = True
    bars = np.array([text == BAR for text in one.cells.values()])
    assert bars.any() or spread[full].min() > spread[~full].max()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40))
def test_syllables_show_no_held_out_word(index):
    one = syllables("train", index, 6)
    texts = [text for text in one.cells.values() if text.isalpha()]
    assert not {*texts} & {*words("dev"), *words("test")}
    assert all(text[:2] in FIRST and text[2:] in SECOND for text in texts)
    assert len(one.cells) > 20
