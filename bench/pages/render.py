"""A page as a picture: one font, size and pair of colours per page, letters at one distance, rules, bars, noise."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from pages.fonts import FONTS, PITCH, SIZES, STRETCHES, ink
from pages.layout import BAR, Page, generator
from pages.model import TOKEN
from pages.words import SIDE, Split

STREAM = 3  # of a page's random numbers; 0 lays it out, 1 and 2 ask


def render(page: Page, split: Split, index: int, side: int = SIDE) -> np.ndarray:
    """The picture of page number `index`, uint8 [32 * side, 32 * side, 3], the same on every call."""
    rng = generator(split, index, STREAM)
    font = FONTS[split][int(rng.integers(len(FONTS[split])))]
    size, stretch = int(rng.choice(SIZES)), float(rng.choice(STRETCHES))
    top, left = rng.integers(1, 4, 2).tolist()  # of the ink in its cell; everywhere alike but for a pixel in height
    cover = np.zeros((side * TOKEN, side * TOKEN), np.uint8)  # 0: paper, 255: ink
    for (row, column), text in page.cells.items():
        y, x = row * TOKEN, column * TOKEN
        if text == BAR:
            cover[y + 9 : y + 23, x : x + TOKEN] = 180
            continue
        y += top + int(rng.integers(0, 2))
        for number, letter in enumerate(text):
            drawn = ink(font, size, stretch, letter)
            height, width = drawn.shape
            start = x + left + PITCH * number + (PITCH - width) // 2
            cover[y : y + height, start : start + width] = drawn
    columns = [column for _, column in page.cells]
    for row in page.rules:
        cover[row * TOKEN, min(columns) * TOKEN : (max(columns) + 1) * TOKEN] = 150
    if rng.random() < 0.3:
        cover = np.asarray(Image.fromarray(cover).filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.7)))))
    paper, colour = rng.uniform(190, 255, 3), rng.uniform(0, 90, 3)
    if rng.random() < 0.2:
        paper, colour = colour, paper
    noise = rng.normal(0, rng.uniform(0, 8), cover.shape).astype(np.float32)
    shades = cover.astype(np.float32)[..., None] / 255 * (colour - paper).astype(np.float32)
    shades += paper.astype(np.float32) + noise[..., None]
    return shades.clip(0, 255).round().astype(np.uint8)
