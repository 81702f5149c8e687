"""Load a checkpoint's processor, also on a machine without torchvision, and ask it how it cuts pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import transformers
from transformers import AutoProcessor, ImageProcessingMixin, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.utils import is_torchvision_available

from fastmmoe.families import FAMILIES, Family, Tiling
from fastmmoe.families.checkpoint import read_config, reading
from fastmmoe.families.images_only import VIDEO_PART, images_only
from fastmmoe.families.names import configs_of

if TYPE_CHECKING:
    from PIL.Image import Image


def load_processor(checkpoint: str) -> Any:
    """The processor of `checkpoint`, a directory or a hub id, by its family's loader where it has one.

    Without torchvision it is one for text and images: there, transformers prepares no videos.

    Raises:
        OSError: there is no such checkpoint, or no processor in it.
        ValueError: one that is not supported, or whose files are broken.
        ImportError: a processor that does not load without torchvision.
    """
    config = read_config(checkpoint)
    with reading(checkpoint):
        return _load(checkpoint, config)


def _load(checkpoint: str, config: Any) -> Any:
    family = _family_of(config)
    if family is not None and family.load_processor is not None:
        return family.load_processor(checkpoint)
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)
    processor_class = images_only(_processor_class(checkpoint, config))
    try:
        return processor_class.from_pretrained(checkpoint, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:
        if "torchvision" not in str(error).lower():
            raise
        raise _needs_torchvision(checkpoint) from error


def check_videos_of(config: Any, processor: Any) -> None:
    """Check that a model with this config takes videos here.

    Raises:
        ValueError: it does not, or not with this package.
        ImportError: its processor needs torchvision for them.
    """
    family = _family_of(config)
    if family is None or not family.videos:
        raise ValueError(f"videos: {config.model_type} takes none here, expected images")
    if getattr(processor, VIDEO_PART, None) is None:
        raise _needs_torchvision("videos")


def tilings(model_config: Any, processor: Any, images: Sequence[Image], inputs: Mapping[str, Any]) -> list[Tiling]:
    """How the processor of a model with this config cut each of the images into vision tokens.

    Args:
        inputs: what it made of them, for the model.

    Raises:
        ValueError: a family of which that is not known here, or whose vision tokens lie nowhere on an image.
    """
    family = _family_of(model_config)
    if family is None or family.tilings is None:
        known = ", ".join(dict.fromkeys(f.title for f in FAMILIES if f.tilings is not None))
        raise ValueError(
            f"processor: no picture for {type(processor).__name__}, of which it is not known where on an image its "
            f"vision tokens lie; known for {known}"
        )
    return family.tilings(model_config, processor, images, inputs)


def _family_of(config: Any) -> Family | None:
    parent, text = configs_of(config)
    kinds = [family for family in FAMILIES if family.parent_type == parent.model_type]
    exact = (family for family in kinds if family.text_type == text.model_type)
    return next(exact, kinds[0] if kinds else None)


def _processor_class(checkpoint: str, config: Any) -> type[ProcessorMixin]:
    """The class that a checkpoint's processor has, by its own word or else by the model's type.

    Raises:
        ValueError: neither tells.
    """
    for read in (ProcessorMixin.get_processor_dict, ImageProcessingMixin.get_image_processor_dict):
        try:
            name = read(checkpoint)[0].get("processor_class")
        except OSError:  # it may have one of the two files alone
            continue
        if name is not None and (found := processor_class_from_name(name)) is not None:
            return found
    if type(config) in PROCESSOR_MAPPING:
        return PROCESSOR_MAPPING[type(config)]
    raise ValueError(f"{checkpoint}: names no processor, and transformers knows none for a {config.model_type} model")


def _needs_torchvision(what: str) -> ImportError:
    return ImportError(
        f"no processor for {what} without torchvision: install the torchvision that matches "
        f"torch {transformers.utils.get_torch_version()} (https://pytorch.org/get-started)"
    )
