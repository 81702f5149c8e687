"""Pictures with known contents: handwritten digits and coloured shapes over photographs.

A picture is 100 x 100 pixels in 5 x 5 cells of 20 x 20. A glyph of 10 x 10 pixels (a digit or a shape, in one of six
colours) stands in one quarter of a cell, a pixel around it at most, so that it mostly falls on one of the 10 x 10
vision tokens of the model in `fastmmoe.scenes`. Digits are scikit-learn's (1797 scans of 8 x 8), backgrounds the
photographs inside scikit-image's wheel, dimmed. No digit scan and no photograph is in two splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")

SIZE = 100  # pixels
CELLS = 5  # per side
CELL = SIZE // CELLS  # pixels
GLYPH = CELL // 2  # pixels

COLOURS = {
    "red": (235, 50, 45),
    "green": (60, 200, 70),
    "blue": (70, 110, 255),
    "yellow": (245, 225, 60),
    "purple": (200, 80, 230),
    "white": (245, 245, 245),
}
SHAPES = ("square", "disc", "cross")

PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": (
        "astronaut.png", "brick.png", "camera.png", "coffee.png", "coins.png", "gravel.png", "hubble_deep_field.jpg",
        "ihc.png", "moon.png", "retina.jpg", "rocket.jpg",
    ),
    "dev": ("cell.png", "grass.png", "page.png"),
    "test": ("chelsea.png", "motorcycle_left.png", "motorcycle_right.png", "text.png"),
}  # fmt: skip
DIGIT_SAMPLES: dict[Split, tuple[int, int]] = {"train": (0, 1300), "dev": (1300, 1500), "test": (1500, 1797)}


@dataclass(frozen=True)
class Glyph:
    """A digit or a shape in a cell. `row` and `column` count from 0, top left; `sample` is the scan of a digit.

    `top` and `left` are the pixels of its corner.
    """

    row: int
    column: int
    top: int
    left: int
    colour: str
    digit: int | None = None
    shape: str | None = None
    sample: int | None = None

    @property
    def token(self) -> int:
        """The vision token, 0 to 99, that sees most of it."""
        return round(self.top / GLYPH) * (SIZE // GLYPH) + round(self.left / GLYPH)


@dataclass(frozen=True)
class Scene:
    """A picture, uint8 [100, 100, 3], and what is in it, in reading order."""

    pixels: np.ndarray
    glyphs: tuple[Glyph, ...]
    photograph: str

    @property
    def digits(self) -> tuple[Glyph, ...]:
        return tuple(glyph for glyph in self.glyphs if glyph.digit is not None)


def scene(split: Split, index: int, digits: tuple[int, int] = (3, 7), shapes: tuple[int, int] = (0, 3)) -> Scene:
    """Scene number `index` of a split, the same on every call: `digits` and `shapes` are the least and most of each.

    Raises:
        ValueError: an unknown split, or more glyphs than cells.
        ImportError: without scikit-learn, scikit-image or Pillow (the `study` extra).
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {SPLITS}")
    if digits[1] + shapes[1] > CELLS**2:
        raise ValueError(f"digits and shapes: got at most {digits[1]} + {shapes[1]}, expected <= {CELLS**2} cells")
    rng = generator(split, index)
    pixels, photograph = _background(split, rng)
    n_digits, n_shapes = (int(rng.integers(low, high + 1)) for low, high in (digits, shapes))
    cells = rng.choice(CELLS**2, n_digits + n_shapes, replace=False)
    glyphs = []
    for number, cell in enumerate(cells):
        row, column = divmod(int(cell), CELLS)
        # in a random quarter of the cell, a pixel aside at most
        corner = np.array((row, column)) * CELL + rng.integers(0, 2, 2) * GLYPH + rng.integers(-1, 2, 2)
        top, left = (int(pixel) for pixel in np.clip(corner, 0, SIZE - GLYPH))
        place = (row, column, top, left, str(rng.choice(list(COLOURS))))
        if number < n_digits:
            sample = int(rng.choice(_samples(split)))
            glyph = Glyph(*place, digit=int(_scans()[1][sample]), sample=sample)
            ink = _scans()[0][sample]
        else:
            glyph = Glyph(*place, shape=str(rng.choice(SHAPES)))
            ink = _shapes()[glyph.shape]
        _draw(pixels, ink, glyph)
        glyphs.append(glyph)
    glyphs.sort(key=lambda glyph: (glyph.row, glyph.column))
    return Scene(pixels.round().astype(np.uint8), tuple(glyphs), photograph)


def generator(split: Split, index: int, stream: int = 0) -> np.random.Generator:
    """A random generator of its own for scene `index` of a split and a purpose (`stream`; 0 draws the scene)."""
    return np.random.default_rng((SPLITS.index(split), index, stream))


def _draw(pixels: np.ndarray, ink: np.ndarray, glyph: Glyph) -> None:
    """Blend `ink`, float32 [10, 10] in 0..1, of the glyph's colour into the picture."""
    patch = pixels[glyph.top : glyph.top + GLYPH, glyph.left : glyph.left + GLYPH]
    patch += ink[:, :, None] * (np.array(COLOURS[glyph.colour], np.float32) - patch)


def _background(split: Split, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """A dimmed random square of a random photograph, float32 [100, 100, 3], and the photograph's file name."""
    from PIL import Image

    name = str(rng.choice(PHOTOGRAPHS[split]))
    photograph = _photograph(name)
    side = int(rng.integers(SIZE, min(photograph.size) + 1))
    left, top = (int(rng.integers(0, length - side + 1)) for length in photograph.size)
    square = photograph.resize((SIZE, SIZE), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    pixels = np.asarray(square, np.float32)
    if rng.integers(2):
        pixels = pixels[:, ::-1]
    return pixels * np.float32(rng.uniform(0.2, 0.45)), name


@cache
def _photograph(name: str):
    """A photograph out of scikit-image's wheel as an RGB `PIL.Image`, 200 pixels on its shorter side."""
    import skimage
    from PIL import Image

    image = Image.open(Path(skimage.data_dir) / name).convert("RGB")
    scale = 2 * SIZE / min(image.size)
    return image.resize([max(2 * SIZE, round(scale * side)) for side in image.size], Image.Resampling.BICUBIC)


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """All digit scans as ink, float32 [1797, 10, 10] in 0..1, and what they show, int64 [1797]."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    scans = [
        np.asarray(Image.fromarray(scan.astype(np.float32)).resize((GLYPH, GLYPH), Image.Resampling.BICUBIC))
        for scan in data.images
    ]
    return np.clip(np.stack(scans) / 16, 0, 1), data.target


@cache
def _samples(split: Split) -> np.ndarray:
    """Which digit scans belong to a split."""
    low, high = DIGIT_SAMPLES[split]
    return np.random.default_rng(0).permutation(1797)[low:high]


@cache
def _shapes() -> dict[str, np.ndarray]:
    """Shapes as ink, float32 [10, 10] of 0 and 1."""
    y, x = np.mgrid[:GLYPH, :GLYPH] - (GLYPH - 1) / 2
    shapes = {
        "square": np.maximum(abs(x), abs(y)) < 4,
        "disc": x**2 + y**2 < 20,
        "cross": (np.minimum(abs(x), abs(y)) < 1) & (np.maximum(abs(x), abs(y)) < 5),
    }
    return {name: ink.astype(np.float32) for name, ink in shapes.items()}
