"""Open the pictures of a user's, or say in a line what is wrong with one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

WIDE = ("I", "F")  # how the modes of more than 8 bits begin


def open_image(path: Path) -> Image:
    """The picture in a file, RGB and upright; of an animation the first frame.

    Raises:
        ValueError: a file that cannot be read, is no whole picture, is beyond Pillow's limit against decompression
            bombs, or has more than 8 bits per channel; names the file.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            # between the sizes at which Pillow warns and refuses there are photographs
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                mode = image.mode
                picture = None if mode.startswith(WIDE) else ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise whatever broken bytes lead them to
        reason = getattr(error, "strerror", None) or f"not an image that Pillow can read ({error})"
        raise ValueError(f"{path}: {reason}") from error
    if picture is None:  # conversion would cut such values off, and not scale them
        raise ValueError(f"{path}: a picture of Pillow's mode {mode}, expected 8 bits per channel")
    return picture
