"""Pictures of a prefill: every vision token over the part of the image it came from, in the colour of its fate."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastmmoe.families import Tiling
from fastmmoe.families.chat import build_inputs
from fastmmoe.families.deepseek_v2 import DEEPSEEK_VL2
from fastmmoe.families.internvl_random import random_model, random_processor
from fastmmoe.families.processors import tilings
from fastmmoe.families.tiling import fitted, grid, tiled
from fastmmoe.families.unlimited_ocr import UNLIMITED_OCR
from fastmmoe.models.deepseek_vl2 import DeepseekVLV2ImageProcessor
from fastmmoe.models.deepseek_vl2.image_tokens import image_token_index
from fastmmoe_cli.bench import cat_photograph
from fastmmoe_cli.picture import draw_fate

from . import tiny_families

KEPT, MERGED, DROPPED, GONE = range(4)


@pytest.fixture(scope="module")
def processor():
    return random_processor()


@pytest.fixture(scope="module")
def model():
    return random_model()


def tiling_of(model, processor, image):
    inputs = build_inputs(model, processor, [image], "?")
    (tiling,) = tilings(model.config, processor, [image], inputs)
    return tiling, inputs


@pytest.mark.parametrize(
    ("width", "height", "columns", "rows", "tokens"),
    [(451, 300, 3, 2, 1792), (448, 448, 1, 1, 256), (448, 1344, 1, 3, 1024)],
    ids=["photograph", "one-tile", "column"],
)
def test_tilings_are_the_processors(model, processor, width, height, columns, rows, tokens):
    tiling, inputs = tiling_of(model, processor, Image.new("RGB", (width, height)))
    assert tiling.tiles == (rows, columns) and tiling.image.shape == (16 * rows, 16 * columns)
    assert (tiling.thumbnail is None) == (rows == columns == 1)
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
    tiling, _ = tiling_of(model, processor, images[0])
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


TILINGS = {
    "tile": tiled(1, 1, 16),
    "grid": Tiling(grid(9, 16), None, 9 * 16),
    "row-ends": Tiling(grid(6, 8, first=5, row_ends=1), None, 5 + 6 * 9),
    "borders-right": Tiling(grid(8, 8), None, 64, covered=(0.0, 0.0, 0.7, 0.95)),
    "borders-around": Tiling(grid(10, 10), None, 100, covered=fitted((160, 90), (1, 1))),
}


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_each_token_gets_the_colour_of_its_fate(tiling, tmp_path):
    green = (40, 160, 40)
    image = Image.new("RGB", (320, 180), green)
    rng = np.random.default_rng(1)
    fate = rng.integers(0, 4, tiling.n_tokens).astype(np.int8)

    def stage_panel(fates):
        path = tmp_path / "picture.png"
        draw_fate(path, [image], [tiling], report_of(fates))
        return np.asarray(Image.open(path).convert("RGB"))

    everything_kept = stage_panel(np.zeros(tiling.n_tokens, np.int8))
    half = everything_kept.shape[1] // 2
    box = np.array(box_of(everything_kept[:, half:], green), float)  # of the photograph
    assert abs((box[1] - box[0]) * image.width - (box[3] - box[2]) * image.height) <= 2 * max(image.size)  # its shape
    left, top, right, bottom = tiling.covered
    height, width = (box[1] - box[0]) / (bottom - top), (box[3] - box[2]) / (right - left)  # with its borders
    rows, columns = tiling.image.shape
    ys = box[0] + ((np.arange(rows) + 0.5) / rows - top) * height
    xs = half + box[2] + ((np.arange(columns) + 0.5) / columns - left) * width
    centres = stage_panel(fate)[np.ix_(ys.astype(int), xs.astype(int))].astype(int)
    fates = fate[tiling.image]
    inside = np.outer((ys >= box[0]) & (ys < box[1]), (xs >= half + box[2]) & (xs < half + box[3]))
    brightness = centres.sum(-1)
    assert (centres[inside & (fates == KEPT)] == green).all()
    grey = centres[~inside & (fates == KEPT)]
    assert (grey[:, 0] == grey[:, 1]).all() and (grey > 200).all()
    blue = centres[inside & (fates == MERGED)]
    assert (blue[:, 2] > blue[:, 0] + 50).all() and (blue[:, 2] > 100).all()
    for where in (inside, ~inside):
        if where.any():
            assert brightness[where & (fates == DROPPED)].max() < 0.5 * brightness[where & (fates == KEPT)].min()
            assert brightness[where & (fates == GONE)].max() < 0.8 * brightness[where & (fates == DROPPED)].min()


@pytest.mark.parametrize("global_view_pos", ["head", "tail"])
def test_views_of_deepseek_vl2_lie_where_the_port_puts_them(global_view_pos):
    images = [Image.new("RGB", size) for size in ((90, 30), (40, 100))]
    settings = DeepseekVLV2ImageProcessor([[32, 32], [64, 32], [96, 32], [32, 96]], patch_size=4)
    inputs = settings([images], return_tensors="pt")
    config = SimpleNamespace(global_view_pos=global_view_pos)
    found = DEEPSEEK_VL2.tilings(config, SimpleNamespace(image_processor=settings), images, inputs)
    for tiling, (wide, high) in zip(found, [(3, 1), (1, 3)], strict=True):
        # which feature of which tile each token shows
        shows = image_token_index(wide, high, 4, 0, 1 + wide * high, global_view_pos == "head").numpy()
        assert tiling.n_tokens == len(shows) and tiling.tiles == (high, wide)
        image, view = tiling.grids(shows)
        assert (view == np.arange(16).reshape(4, 4)).all()
        tile = image.reshape(high, 4, wide, 4).swapaxes(1, 2).reshape(-1, 16)
        assert (tile.ravel() == 16 + np.arange(16 * wide * high)).all()
    # 90 x 30 pixels are 96 x 32 of 96 x 32, and 32 x 10.7 of 32 x 32
    np.testing.assert_allclose(found[0].covered, (0, 0, 1, 1), atol=1e-9)
    np.testing.assert_allclose(found[0].thumbnail_covered, (0, 1 / 3, 1, 2 / 3))


@torch.no_grad()
def test_views_of_unlimited_ocr_lie_where_the_model_puts_them():
    """Every token without a place is one of the model's row ends or separators, and no other is."""
    model, _ = tiny_families.unlimited_ocr()
    grids, counts = [(2, 3), (1, 1)], [6, 0]  # columns and rows
    settings = SimpleNamespace(
        size={"height": 128, "width": 128}, tile_size=64, crop_to_patches=True, maximum_pad_value=64
    )
    processor = SimpleNamespace(image_processor=settings, patch_size=8, downsample_ratio=4)
    images = [Image.new("RGB", (128, 192)), Image.new("RGB", (60, 40))]
    inputs = {"patches_grid": grids, "num_local_patches": counts}
    found = UNLIMITED_OCR.tilings(model.config, processor, images, inputs)
    pixels = [torch.randn(n, 3, size, size) for n, size in ((2, 128), (6, 64))]
    features = model.model.get_image_features(*pixels, counts, grids, return_dict=True).pooler_output
    marks = [model.model.image_newline, model.model.view_separator]
    for tiling, tokens in zip(found, features, strict=True):
        is_mark = torch.stack([(tokens == mark).all(-1) for mark in marks]).any(0).numpy()
        assert tiling.n_tokens == len(tokens)
        placed = [tiling.image, *([] if tiling.thumbnail is None else [tiling.thumbnail])]
        places = np.concatenate([one.ravel() for one in placed])
        assert sorted([*places, *np.flatnonzero(is_mark)]) == list(range(len(tokens)))
    assert found[0].tiles == (3, 2) and found[0].image.shape == (6, 4) and found[0].thumbnail.shape == (4, 4)
    assert found[1].thumbnail is None and found[1].covered == pytest.approx((0, 1 / 6, 1, 5 / 6))


def test_size_and_panels_of_several_images_and_stages(tmp_path):
    images = [cat_photograph(), Image.new("RGB", (300, 900), (0, 120, 200))]
    cut = [tiled(2, 3, 16), tiled(3, 1, 16)]
    n = sum(tiling.n_tokens for tiling in cut)
    path = tmp_path / "picture.png"
    draw_fate(path, images, cut, report_of(*np.zeros((3, n), np.int8)))
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width == 1920
        assert picture.height > 1920  # two images, two rows of panels each
        pixels = np.asarray(picture.convert("RGB"))
    # the plain image stands in four panels, each with its thumbnail
    filled = (pixels == (0, 120, 200)).all(-1)
    starts = (np.diff(filled.astype(int), axis=1, prepend=0) == 1).sum(1)
    assert starts.max() == 4


def test_what_cannot_be_drawn_is_refused(model, processor, tmp_path):
    image = Image.new("RGB", (448, 448))
    cut = [tiled(1, 1, 16)]
    path = tmp_path / "picture.png"
    with pytest.raises(ValueError, match="no layer pruned"):
        draw_fate(path, [image], cut, SimpleNamespace(stages=[], n_vision=(256,)))
    with pytest.raises(ValueError, match="256 vision tokens, but the report has 255"):
        draw_fate(path, [image], cut, report_of(np.zeros(255, np.int8)))
    queries = tiny_families.aria()[0]  # whose tokens answer for the image as a whole
    with pytest.raises(ValueError, match="not known where on an image its vision tokens lie"):
        tilings(queries.config, processor, [image], {})
    assert not path.exists()
