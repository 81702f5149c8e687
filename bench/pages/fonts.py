"""The fonts of the pages, from packages, none in two splits; and words as ink.

matplotlib brings DejaVu, STIX and Computer Modern, the `pages` extra the rest.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np

from pages.words import Split

SIZES = (10, 11, 12, 13)  # pixels per em

# package and file of every style
FONTS: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("matplotlib", "DejaVuSans.ttf"),
        ("matplotlib", "DejaVuSans-Bold.ttf"),
        ("matplotlib", "DejaVuSans-Oblique.ttf"),
        ("matplotlib", "DejaVuSansMono.ttf"),
        ("matplotlib", "cmr10.ttf"),
        ("matplotlib", "cmss10.ttf"),
        ("matplotlib", "cmtt10.ttf"),
        ("font_source_sans_pro", "SourceSansPro-Regular.ttf"),
        ("font_source_sans_pro", "SourceSansPro-Semibold.ttf"),
        ("font_source_sans_pro", "SourceSansPro-It.ttf"),
        ("font_source_serif_pro", "SourceSerifPro-Regular.ttf"),
        ("font_source_serif_pro", "SourceSerifPro-Bold.ttf"),
        ("font_source_serif_pro", "SourceSerifPro-It.ttf"),
        ("font_manrope", "Manrope-Regular.ttf"),
        ("font_manrope", "Manrope-Bold.ttf"),
    ),
    "dev": (
        ("font_hanken_grotesk", "HankenGrotesk-Regular.otf"),
        ("font_hanken_grotesk", "HankenGrotesk-Bold.otf"),
        ("matplotlib", "STIXGeneral.ttf"),
    ),
    "test": (
        ("font_lato", "Lato-Regular.ttf"),
        ("font_lato", "Lato-Bold.ttf"),
        ("font_caladea", "Caladea-Regular.ttf"),
        ("font_caladea", "Caladea-Bold.ttf"),
        ("matplotlib", "DejaVuSerif.ttf"),
    ),
}


@cache
def _file(package: str, name: str) -> Path:
    """Raises ImportError if the package is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f"{package} is not installed: python -m pip install 'fastmmoe[pages]'")
    folder = "mpl-data/fonts/ttf" if package == "matplotlib" else "files"
    return Path(spec.submodule_search_locations[0]) / folder / name


@cache
def _font(package: str, name: str, size: int):
    from PIL import ImageFont

    return ImageFont.truetype(str(_file(package, name)), size)


@cache
def ink(font: tuple[str, str], size: int, text: str, widest: int) -> np.ndarray:
    """A text as ink, float32 [1.5 * size, width] in 0..1, its baseline at 1.1 * size; squeezed where it is too wide."""
    from PIL import Image, ImageDraw

    drawn = _font(*font, size)
    left, _, right, _ = drawn.getbbox(text, anchor="ls")
    image = Image.new("L", (right - left, round(1.5 * size)))
    ImageDraw.Draw(image).text((-left, round(1.1 * size)), text, fill=255, font=drawn, anchor="ls")
    if image.width > widest:
        image = image.resize((widest, image.height), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32) / 255
