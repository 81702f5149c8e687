"""Draw what became of every vision token: one panel per prune stage, over the photograph the tokens came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastmmoe.families import Tiling
from fastmmoe.families.tiling import Box
from fastmmoe.report import DROPPED, KEPT, MERGED, PrefillReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image


# layout in inches; the picture is 1920 pixels wide
WIDTH, DPI = 12.8, 150
MARGIN, GAP, TITLE, LEGEND, HEADING = 0.25, 0.3, 0.55, 0.5, 0.55
MAX_HEIGHT = 6.0  # of one photograph
THUMBNAIL, SPACE = 0.24, 0.08  # the thumbnail's share of a panel's width, and what lies between it and the tiles

BORDER = "0.85"  # what a processor puts around a photograph
BLUE = (0.16, 0.52, 1.0)
# by StageReport.fate: red, green, blue, opacity over the photograph
TINTS = np.array([(0, 0, 0, 0), (*BLUE, 0.45), (0.05, 0.05, 0.08, 0.72), (0.05, 0.05, 0.08, 0.9)])


def draw_fate(
    path: str | Path, images: Sequence[Image], tilings: Sequence[Tiling], report: PrefillReport, sample: int = 0
) -> None:
    """Write a PNG of the images, as they are and after each prune stage of one sample of a prefill.

    Args:
        path: the file to write.
        images: the sample's images in the order of the prompt.
        tilings: where the tokens of each lie, see `fastmmoe.families.processors.tilings`.
        report: the prefill's report; its stages' `fate` holds one value per vision token of the prompt.
        sample: which sample of the batch.

    Raises:
        ValueError: a report without prune stages, or one whose vision tokens are not those of the images.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not report.stages:
        raise ValueError("report: no layer pruned vision tokens, there is nothing to draw")
    n_tokens = [tiling.n_tokens for tiling in tilings]
    if sum(n_tokens) != report.n_vision[sample]:
        raise ValueError(f"tilings: {sum(n_tokens)} vision tokens, but the report has {report.n_vision[sample]}")

    # one row of panels holds at most two: the photograph, then the stages
    columns = min(2, 1 + len(report.stages))
    panel = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) / columns
    shapes = [_shape(image, panel, tiling) for image, tiling in zip(images, tilings, strict=True)]
    rows = -(-(1 + len(report.stages)) // columns)
    height = HEADING + LEGEND + rows * sum(h + TITLE for _, h in shapes)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")

    above = {"xycoords": "axes fraction", "textcoords": "offset points"}

    def axes(left: float, top: float, width: float, height_: float) -> Axes:
        return figure.add_axes((left / WIDTH, 1 - (top + height_) / height, width / WIDTH, height_ / height))

    top = HEADING
    splits = np.cumsum(n_tokens)[:-1]
    fates = [None, *(np.split(stage.fate[sample], splits) for stage in report.stages)]
    for index, (image, tiling, (width, image_height)) in enumerate(zip(images, tilings, shapes, strict=True)):
        # once to the size it is shown at: every panel would resample a large photograph again
        shown = image.resize((max(1, round(width * DPI)), max(1, round(image_height * DPI))))
        for number, fate in enumerate(fates):
            left = MARGIN + number % columns * (panel + GAP)
            y = top + number // columns * (image_height + TITLE) + TITLE
            grids = (None, None) if fate is None else tiling.grids(fate[index])
            ax = axes(left, y, width, image_height)
            _draw(ax, shown, grids[0], tiling.image.shape, tiling.covered, tiling.tiles)
            if fate is None:
                name = f"image {index + 1}" if len(images) > 1 else "photograph"
                detail = f"{tiling.n_tokens:,} vision tokens, {_cut(tiling)}"
            else:
                stage = report.stages[number - 1]
                name = f"layer {stage.layer}"
                detail = _counts(fate[index], stage.merged[sample] if len(images) == 1 else None)
            ax.annotate(name, (0, 1), (0, 18), **above, weight="bold", size=11)
            ax.annotate(detail, (0, 1), (0, 5), **above, size=9.5)
            if tiling.thumbnail is not None:
                small = panel * THUMBNAIL
                aspect = _aspect(image, tiling.thumbnail_covered)
                # no higher than the panel
                ax = axes(left + width + SPACE, y, min(small, image_height * aspect), min(small / aspect, image_height))
                _draw(ax, shown, grids[1], tiling.thumbnail.shape, tiling.thumbnail_covered)
                ax.annotate("thumbnail", (0, 1), (0, 5), **above, size=9.5)
        top += rows * (image_height + TITLE)

    figure.text(MARGIN / WIDTH, 1 - 0.32 / height, _heading(report, sample), weight="bold", size=13, va="center")
    figure.legend(
        handles=[
            Patch(facecolor="white", edgecolor="0.4", label="kept: as in the photograph"),
            Patch(facecolor=(*BLUE, 0.55), edgecolor=BLUE, label="merged with its neighbours"),
            Patch(facecolor="0.33", label="dropped at this layer"),
            Patch(facecolor="0.08", label="gone at an earlier layer"),
        ],
        loc="lower center",
        ncols=4,
        frameon=False,
        fontsize=10,
    )
    figure.savefig(path)


def _aspect(image: Image, covered: Box) -> float:
    """Width by height of what a photograph covers this part of."""
    left, top, right, bottom = covered
    return (image.width / (right - left)) / (image.height / (bottom - top))


def _shape(image: Image, panel: float, tiling: Tiling) -> tuple[float, float]:
    """Width and height of the photograph in a panel, in inches, with the borders that the processor puts around it."""
    width = panel if tiling.thumbnail is None else panel * (1 - THUMBNAIL) - SPACE
    aspect = _aspect(image, tiling.covered)
    width = min(width, MAX_HEIGHT * aspect)
    return width, width / aspect


def _cut(tiling: Tiling) -> str:
    """How an image was cut, in words."""
    rows, columns = tiling.tiles if tiling.thumbnail is not None else tiling.image.shape
    return f"{rows} x {columns} tiles and a thumbnail" if tiling.thumbnail is not None else f"{rows} x {columns}"


def _draw(
    ax: Axes,
    image: Image,
    fate: np.ndarray | None,
    shape: tuple[int, int],
    covered: Box,
    tiles: tuple[int, int] = (1, 1),
) -> None:
    """The photograph in token coordinates, tinted by fate if given.

    Args:
        fate: [rows, columns].
        shape: (rows, columns) of tokens.
        covered: the part of them that shows the photograph.
        tiles: (rows, columns) of tiles, for the lines between them.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    (height, width), (rows, columns) = shape, tiles
    left, top, right, bottom = covered
    extent = (0, width, height, 0)
    ax.add_patch(Rectangle((0, 0), width, height, facecolor=BORDER, zorder=-1))
    ax.imshow(image, extent=(left * width, right * width, bottom * height, top * height), aspect="auto")
    ax.set(xlim=(0, width), ylim=(height, 0))
    if fate is None:
        ax.hlines(np.arange(1, rows) * height / rows, 0, width, color="white", linewidth=0.8, alpha=0.7)
        ax.vlines(np.arange(1, columns) * width / columns, 0, height, color="white", linewidth=0.8, alpha=0.7)
    else:
        ax.imshow(TINTS[fate], extent=extent, aspect="auto", interpolation="nearest")
        cells = [Rectangle((x, y), 1, 1) for y, x in np.argwhere(fate == MERGED)]
        ax.add_collection(PatchCollection(cells, facecolor="none", edgecolor=BLUE, linewidth=0.6))
    ax.set_axis_off()


def _counts(fate: np.ndarray, n_windows: int | None) -> str:
    """One image's tokens at one stage, in words; the parts add up to those that entered."""
    kept, merged, dropped = (int((fate == value).sum()) for value in (KEPT, MERGED, DROPPED))
    into = "" if n_windows is None else f" into {n_windows:,}"
    return f"of {kept + merged + dropped:,} tokens {kept:,} kept, {merged:,} merged{into}, {dropped:,} dropped"


def _heading(report: PrefillReport, sample: int) -> str:
    last = report.stages[-1]
    left = last.kept[sample] + last.merged[sample]
    return f"FastMMoE: {report.n_vision[sample]:,} vision tokens, {left:,} after layer {last.layer}"
