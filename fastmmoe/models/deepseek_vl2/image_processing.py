"""DeepSeek-VL2's image processor: a global view and the tiles of the best fitting resolution, with Pillow and numpy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image

from fastmmoe.models.deepseek_vl2.configuration import CANDIDATE_RESOLUTIONS
from fastmmoe.models.deepseek_vl2.image_tokens import num_image_tokens, tokens_per_side

MAX_TILED_IMAGES = 2  # with more images in a conversation every one takes a single local tile


class DeepseekVLV2ImageProcessor(BaseImageProcessor):
    """Cuts images into tiles.

    Args:
        candidate_resolutions: (width, height) that an image may be padded to and cut; a tile is as wide and as high
            as the first one is wide.
        patch_size, downsample_ratio: the model's; they decide the number of tokens.
        image_mean, image_std: per channel, of values in [0, 1]; the mean is the colour of borders too.
        normalize: subtract the mean and divide by the standard deviation.
    """

    model_input_names = ["images", "images_spatial_crop"]

    def __init__(
        self,
        candidate_resolutions: Sequence[Sequence[int]] = CANDIDATE_RESOLUTIONS,
        patch_size: int = 14,
        downsample_ratio: int = 2,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        normalize: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.candidate_resolutions = [list(size) for size in candidate_resolutions]
        self.patch_size = patch_size
        self.downsample_ratio = downsample_ratio
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.normalize = normalize

    @property
    def tile_size(self) -> int:
        return self.candidate_resolutions[0][0]

    def num_image_tokens(self, tiles_wide: int, tiles_high: int) -> int:
        """Tokens of an image with so many local tiles."""
        side = tokens_per_side(self.tile_size, self.patch_size, self.downsample_ratio)
        return num_image_tokens(tiles_wide, tiles_high, side)

    def select_best_resolution(self, width: int, height: int) -> tuple[int, int]:
        """The candidate (width, height) that keeps most of an image's pixels and, of those, wastes the least area."""

        def worth(candidate: Sequence[int]) -> tuple[int, int]:
            scale = min(candidate[0] / width, candidate[1] / height)
            effective = min(int(width * scale) * int(height * scale), width * height)
            return effective, effective - candidate[0] * candidate[1]

        best_width, best_height = max(self.candidate_resolutions, key=worth)  # the first of equals
        return best_width, best_height

    def preprocess(
        self, images: Any, tile: bool | None = None, return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Tiles of a batch of conversations.

        Args:
            images: one image, the images of one conversation, or a list of such lists, one per conversation. An image
                is a `PIL.Image`, a uint8 array [height, width, 3], or what `transformers.image_utils.load_image` reads.
            tile: whether to tile images; None: those of conversations with at most two images.
            return_tensors: "pt", the only form there is.

        Returns:
            images: float32 [B, tiles, 3, S, S], per image its global view and its local tiles row by row, then zeros.
            images_spatial_crop: int64 [B, images, 2], local tiles (wide, high), then zeros. A conversation without
                images has one tile and one crop of zeros.

        Raises:
            TypeError, ValueError: no image, an image too narrow for a tile, or an option that does not exist.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors: expected pt, got {return_tensors!r}")
        if kwargs:
            raise TypeError(f"{next(iter(kwargs))}: no such option; set it when the processor is made")
        tiles, crops = zip(*(self._conversation(batch, tile) for batch in _as_batch(images)), strict=True)
        data = {"images": _padded(tiles), "images_spatial_crop": _padded(crops)}
        return BatchFeature(data, tensor_type="pt")

    def _conversation(self, images: Sequence[Any], tile: bool | None) -> tuple[np.ndarray, np.ndarray]:
        """([tiles, 3, S, S], [images, 2]) of one conversation's images."""
        size = self.tile_size
        if not images:
            return np.zeros((1, 3, size, size), np.float32), np.zeros((1, 2), np.int64)
        if tile is None:
            tile = len(images) <= MAX_TILED_IMAGES
        tiles, crops = [], []
        for image in map(_load, images):
            width, height = self.select_best_resolution(*image.size) if tile else (size, size)
            tiles.append(self._pixels(_pad_to(image, size, size, self._border))[None])
            local = self._pixels(_pad_to(image, width, height, self._border))
            wide, high = width // size, height // size
            local = local.reshape(3, high, size, wide, size).transpose(1, 3, 0, 2, 4)
            tiles.append(local.reshape(-1, 3, size, size))
            crops.append((wide, high))
        return np.concatenate(tiles), np.array(crops, np.int64)

    @property
    def _border(self) -> tuple[int, ...]:
        return tuple(int(mean * 255) for mean in self.image_mean)

    def _pixels(self, image: Any) -> np.ndarray:
        """float32 [3, height, width]."""
        pixels = np.asarray(image).astype(np.float32).transpose(2, 0, 1) / np.float32(255)
        if not self.normalize:
            return pixels
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.image_mean, self.image_std))
        return (pixels - mean) / std


def _as_batch(images: Any) -> list[list[Any]]:
    if not isinstance(images, (list, tuple)):
        return [[images]]
    if images and all(isinstance(batch, (list, tuple)) for batch in images):
        return [list(batch) for batch in images]
    return [list(images)]


def _load(image: Any) -> Any:
    """An RGB `PIL.Image`."""
    from PIL import Image

    return Image.fromarray(image).convert("RGB") if isinstance(image, np.ndarray) else load_image(image)


def _pad_to(image: Any, width: int, height: int, colour: tuple[int, ...]) -> Any:
    """Scale to fit, keep the aspect, and fill up with borders on both sides."""
    from PIL import Image, ImageOps

    if min(width / image.width, height / image.height) * min(image.size) < 0.5:
        raise ValueError(f"images: {image.width} x {image.height} pixels are too narrow for {width} x {height}")
    return ImageOps.pad(image, (width, height), method=Image.Resampling.BICUBIC, color=colour)


def _padded(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """Stack arrays that differ in their first dimension, with zeros behind the shorter ones."""
    out = np.zeros((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(out)
