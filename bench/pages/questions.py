"""Questions about a page with one short answer each: about one place, about several, or about the layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pages.layout import BAR, Entry, Page
from pages.words import SPLITS, made_up, words


@dataclass(frozen=True)
class Question:
    """A question of one of the `TYPES`, and its one right answer."""

    type: str
    text: str
    answer: str


Asked = tuple[str, str] | None  # text and answer; None where the page has nothing to ask for


def ask(page: Page, type: str, rng: np.random.Generator) -> Question | None:
    """A random question of that type, or None where the page has nothing to ask for."""
    asked = TYPES[type][1](page, rng)
    return None if asked is None else Question(type, *asked)


def types_of(kind: str) -> list[str]:
    """The types of question that a kind of page allows."""
    return [name for name, (kinds, _) in TYPES.items() if kind in kinds.split()]


def group_of(type: str) -> str:
    """`one`, `several` or `layout`."""
    return next(group for group, types in GROUPS.items() if type in types)


def _one(items, rng: np.random.Generator):
    return items[int(rng.integers(len(items)))]


def _place(row: int, column: int) -> str:
    return f"r{row + 1} c{column + 1}"


def _unique(page: Page) -> dict[str, tuple[int, int]]:
    """Words that stand on the page once, and where."""
    counts = Counter(page.cells.values())
    return {text: place for place, text in page.cells.items() if counts[text] == 1 and text.isalpha()}


def _two(page: Page, number: int, rng: np.random.Generator) -> tuple[Entry, Entry] | None:
    """Two entries that differ in a number."""
    one, other = (page.entries[i] for i in rng.choice(len(page.entries), 2, replace=False))
    return (one, other) if one.numbers[number] != other.numbers[number] else None


def _greater(name: str, pair: tuple[Entry, Entry] | None, number: int) -> Asked:
    if pair is None:
        return None
    one, other = pair
    answer = max(pair, key=lambda entry: entry.numbers[number]).label
    return f"{name} {one.label} or {other.label}", answer


def _greatest(name: str, page: Page, number: int) -> Asked:
    numbers = [entry.numbers[number] for entry in page.entries]
    if numbers.count(max(numbers)) > 1:
        return None
    return f"{name}", page.entries[numbers.index(max(numbers))].label


def _read(page: Page, rng: np.random.Generator) -> Asked:
    places = [place for place, text in page.cells.items() if text != BAR]
    place = _one(places, rng)
    return f"at {_place(*place)}", page.cells[place]


def _after(page: Page, rng: np.random.Generator) -> Asked:
    found = [(text, page.cells[r, c + 1]) for text, (r, c) in _unique(page).items() if (r, c + 1) in page.cells]
    if not found:
        return None
    text, answer = _one(found, rng)
    return f"after {text}", answer


def _below(page: Page, rng: np.random.Generator) -> Asked:
    step = page.lines[1] - page.lines[0]
    found = [(text, page.cells[r + step, c]) for text, (r, c) in _unique(page).items() if (r + step, c) in page.cells]
    if not found:
        return None
    text, answer = _one(found, rng)
    return f"below {text}", answer


def _where(page: Page, rng: np.random.Generator) -> Asked:
    if not (unique := _unique(page)):
        return None
    text = _one(sorted(unique), rng)
    return f"where is {text}", _place(*unique[text])


def _exists(page: Page, rng: np.random.Generator) -> Asked:
    present = sorted({text for text in page.cells.values() if text.isalpha()})
    if not present:
        return None
    if rng.random() < 0.5:
        return f"is there {_one(present, rng)}", "yes"
    pools = (*map(words, SPLITS), made_up())
    absent = _one(next(pool for pool in pools if present[0] in pool), rng)
    return None if absent in present else (f"is there {absent}", "no")


def _count(page: Page, rng: np.random.Generator) -> Asked:
    counts = Counter(text for text in page.cells.values() if text.isalpha())
    often = sorted(text for text, count in counts.items() if 1 < count < 10)
    once = sorted(text for text, count in counts.items() if count == 1)
    pool = often if often and (not once or rng.random() < 0.75) else once
    if not pool:
        return None
    text = _one(pool, rng)
    return f"times {text}", str(counts[text])


def _cell(page: Page, rng: np.random.Generator) -> Asked:
    entry, column = _one(page.entries, rng), int(rng.integers(len(page.headers)))
    return f"{page.headers[column]} of {entry.label}", str(entry.numbers[column])


def _find(page: Page, rng: np.random.Generator) -> Asked:
    entry, column = _one(page.entries, rng), int(rng.integers(len(page.headers)))
    return f"which has {entry.numbers[column]} in {page.headers[column]}", entry.label


def _larger(page: Page, rng: np.random.Generator) -> Asked:
    column = int(rng.integers(len(page.headers)))
    return _greater(f"{page.headers[column]} larger", _two(page, column, rng), column)


def _largest(page: Page, rng: np.random.Generator) -> Asked:
    column = int(rng.integers(len(page.headers)))
    return _greatest(f"max {page.headers[column]}", page, column)


def _next_column(page: Page, rng: np.random.Generator) -> Asked:
    column = int(rng.integers(len(page.headers) - 1))
    return f"column after {page.headers[column]}", page.headers[column + 1]


def _price(page: Page, rng: np.random.Generator) -> Asked:
    entry = _one(page.entries, rng)
    return f"price of {entry.label}", str(entry.numbers[1])


def _quantity(page: Page, rng: np.random.Generator) -> Asked:
    entry = _one(page.entries, rng)
    return f"quantity of {entry.label}", str(entry.numbers[0])


def _together(page: Page, rng: np.random.Generator) -> Asked:
    one, other = (page.entries[i] for i in rng.choice(len(page.entries), 2, replace=False))
    return f"sum {one.label} and {other.label}", str(one.numbers[0] + other.numbers[0])


def _length(page: Page, rng: np.random.Generator) -> Asked:
    entry = _one(page.entries, rng)
    return f"length of {entry.label}", str(entry.numbers[0])


def _above(page: Page, rng: np.random.Generator) -> Asked:
    least = int(rng.integers(1, 9))
    return f"number above {least}", str(sum(entry.numbers[0] > least for entry in page.entries))


def _entries(page: Page, rng: np.random.Generator) -> Asked:
    return f"number of {ENTRIES[page.kind]}", str(len(page.entries))


ENTRIES = {"table": "rows", "receipt": "items", "chart": "bars"}

# of every type: the kinds of page it is asked about, and how
TYPES: dict[str, tuple[str, Callable[[Page, np.random.Generator], Asked]]] = {
    "read": ("text table receipt", _read),
    "after": ("text", _after),
    "cell": ("table", _cell),
    "find": ("table", _find),
    "price": ("receipt", _price),
    "quantity": ("receipt", _quantity),
    "total": ("receipt", lambda page, rng: ("total", str(page.total))),
    "length": ("chart", _length),
    "exists": ("text table receipt chart", _exists),
    "count": ("text", _count),
    "larger": ("table", _larger),
    "largest": ("table", _largest),
    "dearer": ("receipt", lambda page, rng: _greater("dearer", _two(page, 1, rng), 1)),
    "dearest": ("receipt", lambda page, rng: _greatest("dearest", page, 1)),
    "sum": ("receipt", _together),
    "longer": ("chart", lambda page, rng: _greater("longer", _two(page, 0, rng), 0)),
    "longest": ("chart", lambda page, rng: _greatest("longest", page, 0)),
    "above": ("chart", _above),
    "below": ("text", _below),
    "where": ("text table receipt chart", _where),
    "lines": ("text", lambda page, rng: ("number of lines", str(len(page.lines)))),
    "columns": ("table", lambda page, rng: ("number of columns", str(len(page.headers)))),
    "entries": ("table receipt chart", _entries),
    "next column": ("table", _next_column),
    "first": ("receipt chart", lambda page, rng: ("first item", page.entries[0].label)),
    "last": ("receipt chart", lambda page, rng: ("last item", page.entries[-1].label)),
    "kind": ("text table receipt chart", lambda page, rng: ("kind", page.kind)),
}

GROUPS = {
    "one": ("read", "after", "cell", "find", "price", "quantity", "total", "length"),
    "several": (
        "exists", "count", "larger", "largest", "dearer", "dearest", "sum", "longer", "longest", "above",
    ),
    "layout": ("below", "where", "lines", "columns", "entries", "next column", "first", "last", "kind"),
}  # fmt: skip
