"""A page as a picture: one font, size and pair of colours per page, rules, bars, noise."""

from __future__ import annotations

import numpy as np

from pages.fonts import FONTS, SIZES, ink
from pages.layout import BAR, Page, generator
from pages.model import TOKEN
from pages.words import SIDE, Split

STREAM = 3  # of a page's random numbers; 0 lays it out, 1 and 2 ask


def render(page: Page, split: Split, index: int, side: int = SIDE) -> np.ndarray:
    """The picture of page number `index`, uint8 [28 * side, 28 * side, 3], the same on every call."""
    rng = generator(split, index, STREAM)
    font = FONTS[split][int(rng.integers(len(FONTS[split])))]
    size = int(rng.choice(SIZES))
    # where the ink stands in its cell: everywhere alike, but for a pixel or two
    top = int(rng.integers(2, TOKEN - round(1.5 * size) - 1))
    cover = np.zeros((side * TOKEN, side * TOKEN), np.float32)  # 0: paper, 1: ink
    for (row, column), text in page.cells.items():
        y, x = row * TOKEN, column * TOKEN
        if text == BAR:
            cover[y + 8 : y + 20, x : x + TOKEN] = 0.7
            continue
        drawn = ink(font, size, text, TOKEN - 2)
        height, width = drawn.shape
        y += top + int(rng.integers(-1, 2))
        x += int(rng.integers(0, TOKEN - width + 1))
        cover[y : y + height, x : x + width] = np.maximum(cover[y : y + height, x : x + width], drawn)
    columns = [column for _, column in page.cells]
    left, right = min(columns) * TOKEN, (max(columns) + 1) * TOKEN
    for row in page.rules:
        cover[row * TOKEN, left:right] = 0.6
    paper, colour = rng.uniform(190, 255, 3), rng.uniform(0, 90, 3)
    if rng.random() < 0.2:
        paper, colour = colour, paper
    pixels = paper + cover[..., None] * (colour - paper)
    pixels += rng.normal(0, rng.uniform(0, 8), cover.shape).astype(np.float32)[..., None]
    return pixels.clip(0, 255).round().astype(np.uint8)
