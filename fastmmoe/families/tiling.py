"""Where on a picture its vision tokens lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class Tiling:
    """One image's vision tokens, numbered as they come in the prompt, and where they lie.

    Attributes:
        image: int [rows, columns], the token at each place of the image.
        thumbnail: int [rows, columns], the token at each place of a second view of the whole image; None without.
        n_tokens: all of the image's; those that end a row or separate two views lie nowhere.
        tiles: rows and columns of tiles that the image was cut into.
        covered, thumbnail_covered: the part of `image` and of `thumbnail` that shows the picture, where the processor
            put borders around it: left, top, right and bottom, as shares of the width and the height.
    """

    image: np.ndarray
    thumbnail: np.ndarray | None
    n_tokens: int
    tiles: tuple[int, int] = (1, 1)
    covered: Box = WHOLE
    thumbnail_covered: Box = WHOLE

    def grids(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Lay one value per vision token, [n_tokens], out as `image` and `thumbnail` are."""
        return values[self.image], None if self.thumbnail is None else values[self.thumbnail]


def grid(rows: int, columns: int, first: int = 0, row_ends: int = 0) -> np.ndarray:
    """int [rows, columns]: tokens row by row from number `first`, with `row_ends` further ones behind each row."""
    width = columns + row_ends
    return first + np.arange(rows * width).reshape(rows, width)[:, :columns]


def grid_tilings(config: Any, processor: Any, images: Sequence[Any], inputs: Mapping[str, Any]) -> list[Tiling]:
    """Of a processor that says how many patches an image has, `merge_size` x `merge_size` of which make a token.

    Args:
        inputs: with `image_grid_thw` int [images, 3], patches in time, height and width.
    """
    merge = processor.image_processor.merge_size
    grids = [grid(height // merge, width // merge) for _, height, width in inputs["image_grid_thw"].tolist()]
    return [Tiling(image, None, image.size) for image in grids]


def pixel_tilings(config: Any, processor: Any, images: Sequence[Any], inputs: Mapping[str, Any]) -> list[Tiling]:
    """Of a processor that says how many pixels an image has. Tokens of text may stand between its rows.

    Args:
        inputs: with `image_sizes` int [images, 2], height and width.
    """
    pixels = processor.patch_size * processor.spatial_merge_size  # of a token
    grids = [grid(height // pixels, width // pixels) for height, width in inputs["image_sizes"].tolist()]
    return [Tiling(image, None, image.size) for image in grids]


def tiled(rows: int, columns: int, side: int) -> Tiling:
    """Tiles of `side` x `side` tokens, row by row and one behind the other; of several, a thumbnail behind them."""
    n_tiles = rows * columns
    tiles = np.arange(n_tiles * side**2).reshape(rows, columns, side, side)
    image = tiles.swapaxes(1, 2).reshape(rows * side, columns * side)
    thumbnail = grid(side, side, image.size) if n_tiles > 1 else None
    return Tiling(image, thumbnail, image.size + (0 if thumbnail is None else thumbnail.size), (rows, columns))


def fitted(picture: tuple[float, float], canvas: tuple[float, float]) -> Box:
    """The part of a canvas that a picture covers which was scaled to fit into its middle; sizes as (width, height)."""
    scale = min(canvas[0] / picture[0], canvas[1] / picture[1])
    x, y = (size * scale / whole for size, whole in zip(picture, canvas, strict=True))
    return (1 - x) / 2, (1 - y) / 2, (1 + x) / 2, (1 + y) / 2
