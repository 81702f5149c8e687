"""What stands where on a page, without its pixels: four kinds of page over a grid of SIDE x SIDE vision tokens.

A word, a number or a piece of a bar takes one cell of the grid, and a cell is what one vision token shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pages.words import FIRST, KINDS, SECOND, SIDE, SPLITS, Split, words

BAR = "<bar>"  # a cell full of ink

Place = tuple[int, int]  # row and column, from 0, top left


@dataclass(frozen=True)
class Entry:
    """A row of a table or a receipt, or a bar: its label and its numbers, a table's in the order of its columns."""

    label: str
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Page:
    """A page's cells and what they mean.

    Attributes:
        kind: one of `KINDS`.
        cells: text, or `BAR`, of every cell that is not empty.
        lines: of a text: the rows of its lines, in order.
        headers: of a table: the words above its columns, in order.
        entries: of the other kinds, from top to bottom.
        total: of a receipt.
        rules: rows that have a rule above them.
    """

    kind: str
    cells: dict[Place, str]
    lines: tuple[int, ...] = ()
    headers: tuple[str, ...] = ()
    entries: tuple[Entry, ...] = ()
    total: int = 0
    rules: tuple[int, ...] = ()


def generator(split: Split, index: int, stream: int = 0) -> np.random.Generator:
    """A random generator of its own for page `index` of a split and a purpose (`stream`; 0 lays it out)."""
    return np.random.default_rng((SPLITS.index(split), index, stream))


def page(split: Split, index: int, side: int = SIDE, pool: tuple[str, ...] | None = None) -> Page:
    """Page number `index` of a split, the same on every call; kinds in turn; on the first `side` rows and columns.

    Its words are from `pool`; None: those of the split.
    """
    rng = generator(split, index)
    draw = {"text": _text, "table": _table, "receipt": _receipt, "chart": _chart}[KINDS[index % len(KINDS)]]
    return draw(rng, words(split) if pool is None else pool, side)


def _draw_words(rng: np.random.Generator, pool: tuple[str, ...], count: int) -> list[str]:
    """Different words."""
    return [pool[i] for i in rng.choice(len(pool), count, replace=False)]


def _rows(rng: np.random.Generator, count: int, first: int, last: int) -> list[int]:
    """`count` rows at one distance, 1 or 2, from a random one on, all in `first` to `last`."""
    room = last - first
    step = int(rng.integers(1, 3)) if 2 * (count - 1) <= room else 1
    start = first + int(rng.integers(0, room - step * (count - 1) + 1))
    return [start + step * number for number in range(count)]


def _text(rng: np.random.Generator, pool: tuple[str, ...], side: int) -> Page:
    """Lines of words and numbers; one word in ten stands there several times."""
    rows = _rows(rng, int(rng.integers(2, side // 2 + 1)), 0, side - 1)
    margin = int(rng.integers(0, side // 6 + 1))
    different = _draw_words(rng, pool, min(40 if side > 12 else 20, len(pool)))
    frequent, rest = different[: len(different) // 10], different[len(different) // 10 :]
    cells, unused = {}, iter(rest)
    for row in rows:
        end = side - int(rng.integers(0, side // 3 + 1))
        for column in range(margin, end):
            chance = rng.random()
            if chance < 0.2:
                text = frequent[int(rng.integers(len(frequent)))]
            elif chance < 0.4:
                text = str(int(rng.integers(10, 100)))
            else:
                text = next(unused, None) or rest[int(rng.integers(len(rest)))]
            cells[row, column] = text
    return Page("text", cells, lines=tuple(rows))


def _entry_rows(rng: np.random.Generator, side: int, first: int, last: int) -> list[int]:
    return _rows(rng, int(rng.integers(3, min(8, last - first + 1) + 1)), first, last)


def _table(rng: np.random.Generator, pool: tuple[str, ...], side: int) -> Page:
    """Headers over columns of numbers, labels in front of them."""
    columns = int(rng.integers(2, min(5, side // 2) + 1))
    step = int(rng.integers(1, (side - 1) // columns + 1))
    left = int(rng.integers(0, side - columns * step))
    rows = _entry_rows(rng, side, 2, side - 1)
    top = rows[0] - int(rng.integers(1, min(2, rows[0]) + 1))
    headers, labels = np.split(np.array(_draw_words(rng, pool, columns + len(rows))), [columns])
    values = [rng.choice(np.arange(10, 100), len(rows), replace=False) for _ in headers]
    places = [left + step * (number + 1) for number in range(columns)]
    cells = {(top, place): str(header) for place, header in zip(places, headers, strict=True)}
    entries = []
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        entries.append(Entry(str(label), tuple(int(column[number]) for column in values)))
        cells[row, left] = str(label)
        cells |= {(row, place): str(value) for place, value in zip(places, entries[-1].numbers, strict=True)}
    rules = (rows[0], *(rows[1:] if rng.integers(2) else ()))
    return Page("table", cells, headers=tuple(map(str, headers)), entries=tuple(entries), rules=rules)


def _receipt(rng: np.random.Generator, pool: tuple[str, ...], side: int) -> Page:
    """A shop's name, items with quantity and price, and the total of the prices below a rule."""
    rows = _entry_rows(rng, side, 2, side - 2)
    left = int(rng.integers(0, side - 3))
    middle = int(rng.integers(left + 1, side - 1))
    right = int(rng.integers(middle + 1, side))
    shop, *labels = _draw_words(rng, pool, 1 + len(rows))
    prices = rng.choice(np.arange(10, 100), len(rows), replace=False)
    quantities = rng.integers(1, 10, len(rows))
    cells, entries = {(rows[0] - 2, (left + right) // 2): shop}, []
    for row, label, quantity, price in zip(rows, labels, quantities, prices, strict=True):
        entries.append(Entry(label, (int(quantity), int(price))))
        cells |= {(row, left): label, (row, middle): str(quantity), (row, right): str(price)}
    total = int(prices.sum())
    cells[rows[-1] + 1, right] = str(total)
    return Page("receipt", cells, entries=tuple(entries), total=total, rules=(rows[-1] + 1,))


def _chart(rng: np.random.Generator, pool: tuple[str, ...], side: int) -> Page:
    """Labels, and beside each a bar of so many cells."""
    rows = _entry_rows(rng, side, 0, side - 1)
    most = min(9, side - 2)
    left = int(rng.integers(0, side - 1 - most))
    lengths = rng.integers(1, most + 1, len(rows))
    cells, entries = {}, []
    for row, label, length in zip(rows, _draw_words(rng, pool, len(rows)), lengths, strict=True):
        entries.append(Entry(label, (int(length),)))
        cells[row, left] = label
        cells |= {(row, left + 1 + number): BAR for number in range(int(length))}
    return Page("chart", cells, entries=tuple(entries))


def syllables(split: Split, index: int, side: int) -> Page:
    """A full page to learn letters from: any first half of a word with any second half, unless dev or test has that."""
    rng = generator(split, index)
    held_out = {word for name in SPLITS if name != split for word in words(name)}
    cells: dict[Place, str] = {}
    for row in range(side):
        for column in range(side):
            chance = rng.random()
            if chance < 0.7:
                while (word := _one(FIRST, rng) + _one(SECOND, rng)) in held_out:
                    pass
                cells[row, column] = word
            elif chance < 0.9:
                # numbers of one, two and three digits
                digits = 2 if chance < 0.82 else 1 if chance < 0.86 else 3
                cells[row, column] = str(int(rng.integers(10 ** (digits - 1), 10**digits)))
            elif chance < 0.93:
                cells[row, column] = BAR
    return Page("text", cells)


def _one(halves: tuple[str, ...], rng: np.random.Generator) -> str:
    return halves[int(rng.integers(len(halves)))]
