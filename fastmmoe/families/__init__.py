"""The supported model families, one file each, and which of them a model, a config or a name belongs to."""

import re
from typing import Any

from torch import nn

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.deepseek_v2 import DEEPSEEK_VL2
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.names import plain_name, text_config_of
from fastmmoe.families.qwen3_moe import INTERNVL_QWEN3_MOE
from fastmmoe.families.tiling import Tiling

FAMILIES = (INTERNVL_QWEN3_MOE, DEEPSEEK_VL2)

# text models by plain name
ARCHITECTURES: dict[str, Architecture] = {
    name: architecture for family in FAMILIES for name, architecture in family.architectures.items()
}


def text_models(model: nn.Module) -> list[tuple[Family, nn.Module, nn.Module]]:
    """(family, text model, the multimodal model that calls it) for every supported text model inside `model`."""
    children = ((parent, child) for parent in model.modules() for child in parent.children())
    # torch.compile wraps a module in another that answers for it
    pairs = [(parent, getattr(child, "_orig_mod", child)) for parent, child in children if hasattr(child, "layers")]
    found = {
        id(child): (family, child, parent)
        for parent, child in pairs
        for family in FAMILIES
        if (_model_type(parent), _model_type(child)) == (family.parent_type, family.text_type)
    }
    return list(found.values())


def find_text_model(model: nn.Module) -> tuple[Family, nn.Module, nn.Module]:
    """(family, text model, the multimodal model that calls it) of `model`, which may be wrapped.

    Raises:
        ValueError: no supported pair of a multimodal model and an MoE text model inside `model`, or more than one.
    """
    found = text_models(model)
    if len(found) > 1:
        raise ValueError(f"model: holds {len(found)} supported models, expected one")
    if found:
        return found[0]
    config = getattr(model, "config", None)
    shown = getattr(config, "model_type", type(model).__name__)
    text_type = getattr(getattr(config, "text_config", None), "model_type", None)
    supported = ", ".join(f"{f.parent_type} with a {f.text_type} text model" for f in FAMILIES)
    raise ValueError(
        f"model: unsupported model type {shown!r}{f' with a {text_type} text model' if text_type else ''}; "
        f"supported: {supported}"
    )


def find_preset(model_or_name: Any) -> tuple[Family, Any]:
    """(family, text model's config or None for a name) of a transformers model or config, a model type or a name.

    Raises:
        ValueError: no family's preset is called that.
    """
    if isinstance(model_or_name, str):
        text_config, key = None, plain_name(model_or_name)
        found = (f for f in FAMILIES if key in f.preset.model_types or re.fullmatch(f.preset.names, key))
        shown = repr(model_or_name)
    else:
        text_config, model_type = text_config_of(model_or_name), _model_type(model_or_name)
        if model_type is None:
            model_type = getattr(model_or_name, "model_type", None)
        found = (f for f in FAMILIES if model_type in f.preset.model_types)
        shown = f"a {type(model_or_name).__name__} of model type {model_type!r}"
    family = next(found, None)
    if family is None:
        supported = "; ".join(f.preset.supported for f in FAMILIES)
        raise ValueError(f"model_or_name: no preset for {shown}, expected one of: {supported}")
    return family, text_config


def _model_type(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


__all__ = [
    "ARCHITECTURES",
    "FAMILIES",
    "Architecture",
    "Family",
    "Preset",
    "Tiling",
    "find_preset",
    "find_text_model",
    "plain_name",
    "text_config_of",
    "text_models",
]
