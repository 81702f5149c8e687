"""The supported model families, one file each, and which of them a model, a config or a name belongs to."""

import re
from typing import Any

from torch import nn

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.aria import ARIA
from fastmmoe.families.deepseek_ocr2 import DEEPSEEK_OCR2
from fastmmoe.families.deepseek_v2 import DEEPSEEK_VL2
from fastmmoe.families.diffusion_gemma import DIFFUSION_GEMMA
from fastmmoe.families.dots3_note import DOTS3_NOTE
from fastmmoe.families.ernie4_5_vl_moe import ERNIE4_5_VL_MOE
from fastmmoe.families.family import IMAGE_IDS, Family, Preset
from fastmmoe.families.gemma4 import GEMMA4
from fastmmoe.families.glm4v_moe import GLM4V_MOE
from fastmmoe.families.glm5_next import GLM5_NEXT
from fastmmoe.families.gpt_oss import INTERNVL_GPT_OSS
from fastmmoe.families.inkling import INKLING
from fastmmoe.families.inkling2 import INKLING2
from fastmmoe.families.kimi_k25 import KIMI_K25
from fastmmoe.families.lfm2_moe import LFM2_VL_LFM2_MOE
from fastmmoe.families.llama4 import LLAMA4
from fastmmoe.families.minimax_m3_vl import MINIMAX_M3_VL
from fastmmoe.families.mistral4 import MISTRAL3_MISTRAL4
from fastmmoe.families.mistral_large4 import MISTRAL_LARGE4
from fastmmoe.families.muse_spark import MUSE_SPARK
from fastmmoe.families.names import configs_of, plain_name, text_config_of
from fastmmoe.families.nemotron_h import NEMOTRON_H_OMNI
from fastmmoe.families.qwen3_5_moe import QWEN3_5_MOE
from fastmmoe.families.qwen3_moe import INTERNVL_QWEN3_MOE
from fastmmoe.families.qwen3_omni_moe import QWEN3_OMNI_MOE
from fastmmoe.families.qwen3_vl_moe import QWEN3_VL_MOE
from fastmmoe.families.qwen4_exp import QWEN4_EXP
from fastmmoe.families.step3p7 import STEP3P7
from fastmmoe.families.tiling import Tiling
from fastmmoe.families.unlimited_ocr import UNLIMITED_OCR

FAMILIES = (
    INTERNVL_QWEN3_MOE,
    INTERNVL_GPT_OSS,
    DEEPSEEK_VL2,
    DEEPSEEK_OCR2,
    UNLIMITED_OCR,
    QWEN3_VL_MOE,
    QWEN3_OMNI_MOE,
    QWEN3_5_MOE,
    QWEN4_EXP,
    GLM4V_MOE,
    GLM5_NEXT,
    KIMI_K25,
    ERNIE4_5_VL_MOE,
    MISTRAL3_MISTRAL4,
    MISTRAL_LARGE4,
    ARIA,
    LLAMA4,
    MUSE_SPARK,
    GEMMA4,
    DIFFUSION_GEMMA,
    MINIMAX_M3_VL,
    STEP3P7,
    DOTS3_NOTE,
    LFM2_VL_LFM2_MOE,
    NEMOTRON_H_OMNI,
    INKLING,
    INKLING2,
)

_PRESETS = tuple(family for family in FAMILIES if family.preset is not None)
_TEXT_TYPES = {family.text_type for family in FAMILIES}

# text models by plain name
ARCHITECTURES: dict[str, Architecture] = {
    name: architecture for family in FAMILIES for name, architecture in family.architectures.items()
}


def register(family: Family) -> None:
    """Support a family of your own from here on, in this process; see `family.py` for what one says.

    Raises:
        TypeError: no `Family`.
        ValueError: a family that there is.
    """
    global FAMILIES, _PRESETS
    if not isinstance(family, Family):
        raise TypeError(f"family: expected a Family, got {type(family).__name__}")
    if any((one.parent_type, one.text_type) == (family.parent_type, family.text_type) for one in FAMILIES):
        raise ValueError(f"family: {family.parent_type} with a {family.text_type} text model is registered already")
    FAMILIES += (family,)
    _TEXT_TYPES.add(family.text_type)
    _PRESETS += (family,) if family.preset is not None else ()
    ARCHITECTURES.update(family.architectures)


def architecture_of(model_or_config: Any) -> Architecture:
    """The sizes of a transformers model's or (composite) config's text model.

    Raises:
        ValueError: no experts, or layers of a kind that is not known here.
    """
    config = text_config_of(model_or_config)
    family = _family_of(config)
    return Architecture.from_config(config, *([] if family is None else [family.mixer_weights, family.norms_heads]))


def expert_obstacle(model_or_name: Any) -> str:
    """Why the vision tokens of a model, a config or a name in `ARCHITECTURES` cannot take fewer experts, or ""."""
    if isinstance(model_or_name, str):
        family = next((family for family in FAMILIES if model_or_name in family.architectures), None)
        config = ARCHITECTURES.get(model_or_name)
    else:
        config = text_config_of(model_or_name)
        family = _family_of(config)
    return "" if family is None else family.expert_obstacle(config)


def text_models(model: nn.Module) -> list[tuple[Family, nn.Module, nn.Module]]:
    """(family, text model, the multimodal model that calls it) for every known text model inside `model`."""
    found: dict[int, tuple[Family, nn.Module, nn.Module]] = {}
    # no function that calls itself: it would be a cycle, which keeps what it found until the next collection
    waiting: list[tuple[nn.Module, nn.Module | None]] = [(model, None)]
    while waiting:
        module, parent = waiting.pop()
        # torch.compile wraps a module in another that answers for it
        module = module._modules.get("_orig_mod", module)
        kind = _model_type(module)
        if parent is not None and hasattr(module, "layers") and kind != _model_type(parent):
            family = _family_under(parent.config, kind)
            if family is not None:
                found[id(module)] = (family, module, parent)
                continue
        # a head between the two has the text model's config
        if kind is not None and kind not in _TEXT_TYPES:
            parent = module
        waiting += [(child, parent) for child in reversed(list(module.children()))]
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
        family = found[0][0]
        if family.obstacle:
            raise ValueError(f"model: {family.title} is not supported: {family.obstacle}")
        return found[0]
    config = getattr(model, "config", None)
    parents = sorted({family.parent_type for family in FAMILIES if family.text_type == _model_type(model)})
    if parents:
        raise ValueError(
            f"model: a {_model_type(model)} text model by itself has no vision tokens, expected the multimodal model "
            f"that calls it, such as {' or '.join(parents)}"
        )
    shown = getattr(config, "model_type", type(model).__name__)
    text_type = getattr(getattr(config, "text_config", None), "model_type", None)
    supported = ", ".join(f"{f.parent_type} with a {f.text_type} text model" for f in FAMILIES if not f.obstacle)
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
        found = (f for f in _PRESETS if key in (f.parent_type, f.text_type) or re.fullmatch(f.preset.names, key))
        family, shown = next(found, None), repr(model_or_name)
    else:
        config, text_config = configs_of(model_or_name)
        kind = getattr(config, "model_type", None)
        if text_config is config:
            family = next((f for f in _PRESETS if f.text_type == kind), None)
        else:
            family = _family_under(config, getattr(text_config, "model_type", None))
            if family is None:  # a dense one of a family that also has experts
                family = next((f for f in _PRESETS if f.parent_type == kind), None)
        shown = f"a {type(model_or_name).__name__} of model type {kind!r}"
    if family is not None and family.obstacle:
        raise ValueError(f"model_or_name: {family.title} is not supported: {family.obstacle}")
    if family is None or family.preset is None:
        supported = "; ".join(f.preset.supported for f in _PRESETS)
        raise ValueError(f"model_or_name: no preset for {shown}, expected one of: {supported}")
    return family, text_config


def _family_of(text_config: Any) -> Family | None:
    """The first family with text models of this kind."""
    kind = getattr(text_config, "model_type", None)
    return next((family for family in FAMILIES if family.text_type == kind), None)


def _family_under(parent_config: Any, text_type: str | None) -> Family | None:
    """The family of a text model under a multimodal model with this config."""
    kinds = [family for family in FAMILIES if family.text_type == text_type]
    parent_type = getattr(parent_config, "model_type", None)
    exact = next((family for family in kinds if family.parent_type == parent_type), None)
    if exact is not None or not kinds:
        return exact
    has_images = any(getattr(parent_config, name, None) is not None for name in IMAGE_IDS)
    return kinds[0].under(parent_type) if has_images else None


def _model_type(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


__all__ = [
    "ARCHITECTURES",
    "FAMILIES",
    "Architecture",
    "Family",
    "Preset",
    "Tiling",
    "architecture_of",
    "expert_obstacle",
    "find_preset",
    "find_text_model",
    "plain_name",
    "register",
    "text_config_of",
    "text_models",
]
