"""Pictures of a prefill: every vision token over the part of the image it came from, in the colour of its fate."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastmmoe.cli.bench import cat_photograph
from fastmmoe.cli.picture import draw_fate
from fastmmoe.families import Tiling
from fastmmoe.families.chat import build_inputs
from fastmmoe.families.internvl_random import random_model, random_processor
from fastmmoe.families.qwen3_moe import internvl_tilings

KEPT, MERGED, DROPPED, GONE = range(4)


@pytest.fixture(scope="module")
def processor():
    return random_processor()


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.mark.parametrize(
    ("width", "height", "columns", "rows", "tokens"),
    [(451, 300, 3, 2, 1792), (448, 448, 1, 1, 256), (448, 1344, 1, 3, 1024)],
    ids=["photograph", "one-tile", "column"],
)
def test_tilings_are_the_processors(model, processor, width, height, columns, rows, tokens):
    image = Image.new("RGB", (width, height))
    (tiling,) = internvl_tilings(processor, [image])
    assert tiling == Tiling(columns, rows, side=16)
    inputs = build_inputs(model, processor, [image], "?")
    assert tiling.n_tokens == tokens == (inputs["input_ids"] == model.config.image_token_id).sum()


@pytest.mark.parametrize(
    ("row", "column"),
    [(0, 0), (0, 15), (3, 11), (9, 2), (15, 15), (7, 8)],
    ids=lambda value: str(value),
)
def test_tokens_lie_where_the_vision_tower_saw_them(model, processor, row, column):
    """Change one region of an image and see which tokens change most, through the model's own pixel shuffle.

    The image is 3 x 2 tiles of 448 pixels, so that a thumbnail token covers 3 x 2 of the tiles' tokens of 28 pixels.
    """
    rng = np.random.default_rng(0)
    before = rng.integers(100, 156, (896, 1344, 3), dtype=np.uint8)
    after = before.copy()
    y, x = 2 * 28 * row, 3 * 28 * column
    after[y : y + 2 * 28, x : x + 3 * 28] = (255, 0, 0)
    images = [Image.fromarray(pixels) for pixels in (before, after)]
    (tiling,) = internvl_tilings(processor, images[:1])
    features = []
    for image in images:
        pixel_values = build_inputs(model, processor, [image], "?")["pixel_values"]
        with torch.inference_mode():
            # [tiles, 256, hidden], as it is scattered over the image tokens in their order
            features.append(model.get_image_features(pixel_values).pooler_output)
    change = (features[1] - features[0]).norm(dim=-1).flatten().numpy()
    tiles, thumbnail = tiling.grids(change)
    assert tiles.shape == (32, 48) and thumbnail.shape == (16, 16)
    marked = np.zeros((32, 48), bool)
    marked[2 * row : 2 * row + 2, 3 * column : 3 * column + 3] = True
    assert tiles[marked].min() > 2 * tiles[~marked].max()
    assert np.unravel_index(thumbnail.argmax(), thumbnail.shape) == (row, column)


def report_of(*fates):
    """A report with one sample and one stage per fate array."""
    stages = [
        SimpleNamespace(layer=5 + 3 * i, fate=(fate,), kept=(int((fate == KEPT).sum()),), merged=(1,))
        for i, fate in enumerate(fates)
    ]
    return SimpleNamespace(stages=stages, n_vision=(len(fates[0]),))


def box_of(pixels, colour):
    """Rows and columns of the pixels of exactly this colour: first and last + 1."""
    ys, xs = np.nonzero((pixels == colour).all(-1))
    return ys.min(), ys.max() + 1, xs.min(), xs.max() + 1


def test_each_token_gets_the_colour_of_its_fate(processor, tmp_path):
    green = (40, 160, 40)
    image = Image.new("RGB", (448, 448), green)
    tilings = internvl_tilings(processor, [image])
    rng = np.random.default_rng(1)
    fate = rng.integers(0, 4, 256).astype(np.int8)

    def stage_panel(fates):
        path = tmp_path / "picture.png"
        draw_fate(path, [image], tilings, report_of(fates))
        return np.asarray(Image.open(path).convert("RGB"))

    everything_kept = stage_panel(np.zeros(256, np.int8))
    half = everything_kept.shape[1] // 2
    top, bottom, left, right = box_of(everything_kept[:, half:], green)
    assert abs((bottom - top) - (right - left)) <= 2  # a square image stays square
    panel = stage_panel(fate)[top:bottom, half + left : half + right].astype(int)
    ys = ((np.arange(16) + 0.5) * (bottom - top) / 16).astype(int)
    xs = ((np.arange(16) + 0.5) * (right - left) / 16).astype(int)
    centres = panel[np.ix_(ys, xs)].reshape(256, 3)
    brightness = centres.sum(-1)
    assert (centres[fate == KEPT] == green).all()
    blue = centres[fate == MERGED]
    assert (blue[:, 2] > blue[:, 0] + 50).all() and (blue[:, 2] > 100).all()
    assert brightness[fate == DROPPED].max() < 0.5 * sum(green)
    assert brightness[fate == GONE].max() < 0.8 * brightness[fate == DROPPED].min()


def test_size_and_panels_of_several_images_and_stages(processor, tmp_path):
    images = [cat_photograph(), Image.new("RGB", (300, 900), (0, 120, 200))]
    tilings = internvl_tilings(processor, images)
    n = sum(tiling.n_tokens for tiling in tilings)
    path = tmp_path / "picture.png"
    draw_fate(path, images, tilings, report_of(*np.zeros((3, n), np.int8)))
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width == 1920
        assert picture.height > 1920  # two images, two rows of panels each
        pixels = np.asarray(picture.convert("RGB"))
    # the plain image stands in four panels, each with its thumbnail
    filled = (pixels == (0, 120, 200)).all(-1)
    starts = (np.diff(filled.astype(int), axis=1, prepend=0) == 1).sum(1)
    assert starts.max() == 4


def test_what_cannot_be_drawn_is_refused(processor, tmp_path):
    image = Image.new("RGB", (448, 448))
    tilings = internvl_tilings(processor, [image])
    path = tmp_path / "picture.png"
    with pytest.raises(ValueError, match="no layer pruned"):
        draw_fate(path, [image], tilings, SimpleNamespace(stages=[], n_vision=(256,)))
    with pytest.raises(ValueError, match="256 vision tokens, but the report has 255"):
        draw_fate(path, [image], tilings, report_of(np.zeros(255, np.int8)))
    with pytest.raises(ValueError, match="expected InternVL's"):
        internvl_tilings(object(), [image])
    assert not path.exists()
