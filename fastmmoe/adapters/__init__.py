"""What FastMMoE must know of a model family: one small declarative `Adapter` each."""

from torch import nn

from fastmmoe.adapters.adapter import Adapter
from fastmmoe.adapters.deepseek_vl2 import DEEPSEEK_VL2
from fastmmoe.adapters.qwen3_moe import INTERNVL_QWEN3_MOE

ADAPTERS = (INTERNVL_QWEN3_MOE, DEEPSEEK_VL2)


def find_text_model(model: nn.Module) -> tuple[Adapter, nn.Module, nn.Module]:
    """(adapter, text model, the multimodal model that calls it) of `model`, which may be wrapped (PEFT).

    Raises:
        ValueError: no supported pair of a multimodal model and an MoE text model inside `model`.
    """
    for parent in model.modules():
        parent_type = getattr(getattr(parent, "config", None), "model_type", None)
        for child in parent.children():
            text_type = getattr(getattr(child, "config", None), "model_type", None)
            for adapter in ADAPTERS:
                if (parent_type, text_type) == (adapter.parent_type, adapter.text_type) and hasattr(child, "layers"):
                    return adapter, child, parent
    config = getattr(model, "config", None)
    found = getattr(config, "model_type", type(model).__name__)
    text_type = getattr(getattr(config, "text_config", None), "model_type", None)
    supported = ", ".join(f"{a.parent_type} with a {a.text_type} text model" for a in ADAPTERS)
    raise ValueError(
        f"model: unsupported model type {found!r}{f' with a {text_type} text model' if text_type else ''}; "
        f"supported: {supported}"
    )


__all__ = ["ADAPTERS", "Adapter", "find_text_model"]
