"""Load a checkpoint's processor, also on a machine without torchvision, and ask it how it cuts pictures."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import transformers
from transformers import AutoConfig, AutoProcessor
from transformers.utils import is_torchvision_available

from fastmmoe.families import FAMILIES, Family, Tiling

if TYPE_CHECKING:
    from PIL.Image import Image


def register_ports() -> None:
    """Make the models that this package brings known to transformers' Auto classes."""
    for family in FAMILIES:
        if family.port:
            importlib.import_module(family.port)


def load_processor(checkpoint: str) -> Any:
    """The processor of `checkpoint`, a directory or a hub id, by its family's loader where it has one.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: one that is not supported.
        ImportError: a processor that does not load without torchvision.
    """
    register_ports()
    family = _family_of(AutoConfig.from_pretrained(checkpoint).model_type)
    if family is not None and family.load_processor is not None:
        return family.load_processor(checkpoint)
    try:
        return AutoProcessor.from_pretrained(checkpoint)
    except (ImportError, OSError, ValueError) as error:
        if is_torchvision_available():
            raise
        raise ImportError(
            f"no processor for {checkpoint} without torchvision: install the torchvision that matches "
            f"torch {transformers.utils.get_torch_version()} (https://pytorch.org/get-started)"
        ) from error


def tilings(model_config: Any, processor: Any, images: Sequence[Image]) -> list[Tiling]:
    """How the processor of a model with this config cuts each of the images.

    Raises:
        ValueError: a family whose tiles are not known here.
    """
    family = _family_of(model_config.model_type)
    if family is None or family.tilings is None:
        known = " or ".join(f"{f.title}'s" for f in FAMILIES if f.tilings is not None)
        raise ValueError(f"processor: expected {known}, whose tiles are known here, got {type(processor).__name__}")
    return family.tilings(processor, images)


def _family_of(parent_type: str) -> Family | None:
    return next((family for family in FAMILIES if family.parent_type == parent_type), None)
