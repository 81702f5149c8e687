"""The fonts of the pages, from packages, none in two splits; and letters as ink.

matplotlib brings DejaVu, STIX and Computer Modern, the `pages` extra the rest.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np

from pages.words import Split

SIZES = (11, 12, 13)  # pixels per em
STRETCHES = (0.95, 1.05, 1.2)  # of the width
PITCH = 7  # pixels from letter to letter

# package and file of every style
FONTS: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("matplotlib", "DejaVuSans.ttf"),
        ("matplotlib", "DejaVuSans-Bold.ttf"),
        ("matplotlib", "DejaVuSans-Oblique.ttf"),
        ("matplotlib", "DejaVuSerif.ttf"),
        ("matplotlib", "DejaVuSerif-Italic.ttf"),
        ("matplotlib", "DejaVuSansMono.ttf"),
        ("matplotlib", "DejaVuSansMono-Bold.ttf"),
        ("matplotlib", "cmr10.ttf"),
        ("matplotlib", "cmss10.ttf"),
        ("matplotlib", "cmtt10.ttf"),
        ("matplotlib", "cmti10.ttf"),
        ("matplotlib", "cmb10.ttf"),
        ("font_source_sans_pro", "SourceSansPro-Light.ttf"),
        ("font_source_sans_pro", "SourceSansPro-Regular.ttf"),
        ("font_source_sans_pro", "SourceSansPro-Semibold.ttf"),
        ("font_source_sans_pro", "SourceSansPro-Black.ttf"),
        ("font_source_sans_pro", "SourceSansPro-It.ttf"),
        ("font_source_sans_pro", "SourceSansPro-SemiboldIt.ttf"),
        ("font_source_serif_pro", "SourceSerifPro-Light.ttf"),
        ("font_source_serif_pro", "SourceSerifPro-Regular.ttf"),
        ("font_source_serif_pro", "SourceSerifPro-Semibold.ttf"),
        ("font_source_serif_pro", "SourceSerifPro-Black.ttf"),
        ("font_source_serif_pro", "SourceSerifPro-It.ttf"),
        ("font_source_serif_pro", "SourceSerifPro-SemiboldIt.ttf"),
        ("font_manrope", "Manrope-Light.ttf"),
        ("font_manrope", "Manrope-Regular.ttf"),
        ("font_manrope", "Manrope-SemiBold.ttf"),
        ("font_manrope", "Manrope-ExtraBold.ttf"),
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
def ink(font: tuple[str, str], size: int, stretch: float, letter: str) -> np.ndarray:
    """A letter as ink, uint8 [1.5 * size, up to PITCH] (255: ink), its baseline at 1.1 * size."""
    from PIL import Image, ImageDraw

    drawn = _font(*font, size)
    left, _, right, _ = drawn.getbbox(letter, anchor="ls")
    image = Image.new("L", (right - left, round(1.5 * size)))
    ImageDraw.Draw(image).text((-left, round(1.1 * size)), letter, fill=255, font=drawn, anchor="ls")
    width = min(max(1, round(stretch * image.width)), PITCH)
    if width != image.width:
        image = image.resize((width, image.height), Image.Resampling.BILINEAR)
    return np.asarray(image)
