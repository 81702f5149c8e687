"""Questions about a scene with one short answer each, in the words of `tokenizer.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastmmoe.scenes.pictures import CELLS, COLOURS, Glyph, Scene


@dataclass(frozen=True)
class Question:
    """A question of one of the `TYPES`, and its one right answer."""

    type: str
    text: str
    answer: str


def ask(scene: Scene, type: str, rng: np.random.Generator) -> Question | None:
    """A random question of that type, or None where the scene has nothing to ask for."""
    asked = TYPES[type](scene, rng)
    return None if asked is None else Question(type, *asked)


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question of every type that the scene allows."""
    asked = (ask(scene, type, rng) for type in TYPES)
    return [question for question in asked if question is not None]


def exact_match(said: str, answer: str) -> bool:
    """Whether the words said are the answer's, in its order; spaces and case do not count."""
    return said.lower().split() == answer.split()


def _cell(glyph: Glyph) -> str:
    return f"r{glyph.row + 1} c{glyph.column + 1}"


def _one(items, rng: np.random.Generator):
    return items[int(rng.integers(len(items)))]


def _unique(scene: Scene) -> list[Glyph]:
    """The digits that stand in the picture once."""
    counts = Counter(glyph.digit for glyph in scene.digits)
    return [glyph for glyph in scene.digits if counts[glyph.digit] == 1]


def _read(scene: Scene, rng: np.random.Generator):
    if not scene.digits:
        return None
    glyph = _one(scene.digits, rng)
    return f"digit at {_cell(glyph)} ?", str(glyph.digit)


def _colour_at(scene: Scene, rng: np.random.Generator):
    if not scene.glyphs:
        return None
    glyph = _one(scene.glyphs, rng)
    return f"colour at {_cell(glyph)} ?", glyph.colour


def _colour_of(scene: Scene, rng: np.random.Generator):
    if not (unique := _unique(scene)):
        return None
    glyph = _one(unique, rng)
    return f"colour of {glyph.digit} ?", glyph.colour


def _row_of(scene: Scene, rng: np.random.Generator):
    if not (unique := _unique(scene)):
        return None
    glyph = _one(unique, rng)
    return f"row of {glyph.digit} ?", f"r{glyph.row + 1}"


def _column_of(scene: Scene, rng: np.random.Generator):
    if not (unique := _unique(scene)):
        return None
    glyph = _one(unique, rng)
    return f"column of {glyph.digit} ?", f"c{glyph.column + 1}"


def _read_row(scene: Scene, rng: np.random.Generator):
    # most rows of five are empty: ask for one of them one time in eight
    rows = sorted({glyph.row for glyph in scene.digits})
    row = _one(rows, rng) if rows and rng.random() < 0.875 else int(rng.integers(CELLS))
    return f"digits in r{row + 1} ?", " ".join(str(g.digit) for g in scene.digits if g.row == row) or "none"


def _exists(scene: Scene, rng: np.random.Generator):
    present = sorted({glyph.digit for glyph in scene.digits})
    absent = [digit for digit in range(10) if digit not in present]
    yes = bool(present) and rng.random() < 0.5
    return f"is there a {_one(present if yes else absent, rng)} ?", "yes" if yes else "no"


def _count(scene: Scene, rng: np.random.Generator):
    return "how many digits ?", str(len(scene.digits))


def _count_colour(scene: Scene, rng: np.random.Generator):
    counts = Counter(glyph.colour for glyph in scene.glyphs)
    # a colour that is there, three times in four
    colour = _one(sorted(counts), rng) if counts and rng.random() < 0.75 else _one(list(COLOURS), rng)
    return f"how many are {colour} ?", str(counts[colour])


def _largest(scene: Scene, rng: np.random.Generator):
    if not scene.digits:
        return None
    return "largest digit ?", str(max(glyph.digit for glyph in scene.digits))


def _larger(scene: Scene, rng: np.random.Generator):
    if len(scene.digits) < 2:
        return None
    one, other = (scene.digits[i] for i in rng.choice(len(scene.digits), 2, replace=False))
    return f"larger of {_cell(one)} and {_cell(other)} ?", str(max(one.digit, other.digit))


TYPES: dict[str, Callable[[Scene, np.random.Generator], tuple[str, str] | None]] = {
    "read": _read,
    "colour at": _colour_at,
    "read row": _read_row,
    "row of": _row_of,
    "column of": _column_of,
    "colour of": _colour_of,
    "exists": _exists,
    "count": _count,
    "count colour": _count_colour,
    "largest": _largest,
    "larger": _larger,
}
