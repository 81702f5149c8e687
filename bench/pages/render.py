"""A page as a picture: one font, size and pair of colours per page, rules, bars, noise."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from pages.fonts import FONTS, SIZES, STRETCHES, ink
from pages.layout import BAR, Page, generator
from pages.model import TOKEN
from pages.words import SIDE, Split

STREAM = 3  # of a page's random numbers; 0 lays it out, 1 and 2 ask


def render(page: Page, split: Split, index: int, side: int = SIDE) -> np.ndarray:
    """The picture of page number `index`, uint8 [28 * side, 28 * side, 3], the same on every call."""
    rng = generator(split, index, STREAM)
    font = FONTS[split][int(rng.integers(len(FONTS[split])))]
    size, stretch = int(rng.choice(SIZES)), float(rng.choice(STRETCHES))
    top = int(rng.integers(1, 4))  # of the ink in its cell, everywhere alike but for a pixel
    cover = np.zeros((side * TOKEN, side * TOKEN), np.uint8)  # 0: paper, 255: ink
    for (row, column), text in page.cells.items():
        y, x = row * TOKEN, column * TOKEN
        if text == BAR:
            cover[y + 8 : y + 20, x : x + TOKEN] = 180
            continue
        drawn = ink(font, size, stretch, text, TOKEN - 2)
        height, width = drawn.shape
        y += top + int(rng.integers(0, 2))
        x += int(rng.integers(0, min(3, TOKEN - width) + 1))
        np.maximum(cover[y : y + height, x : x + width], drawn, out=cover[y : y + height, x : x + width])
    columns = [column for _, column in page.cells]
    left, right = min(columns) * TOKEN, (max(columns) + 1) * TOKEN
    for row in page.rules:
        cover[row * TOKEN, left:right] = 150
    if rng.random() < 0.3:
        cover = np.asarray(Image.fromarray(cover).filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.7)))))
    paper, colour = rng.uniform(190, 255, 3), rng.uniform(0, 90, 3)
    if rng.random() < 0.2:
        paper, colour = colour, paper
    noise = rng.normal(0, rng.uniform(0, 8), cover.shape).astype(np.float32)
    shades = cover.astype(np.float32)[..., None] / 255 * (colour - paper).astype(np.float32)
    shades += paper.astype(np.float32) + noise[..., None]
    return shades.clip(0, 255).round().astype(np.uint8)
