"""What a model is called, and which of its configs describes the language model."""

import re
from typing import Any


def configs_of(model_or_config: Any) -> tuple[Any, Any]:
    """(multimodal model's config, its text model's) of a transformers model or config; a text model's own is both."""
    config = getattr(model_or_config, "config", model_or_config)
    inner = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
    for composite in (config, *inner):
        text_config = getattr(composite, "text_config", None)
        if text_config is not None:
            return composite, text_config
    return config, config


def text_config_of(model_or_config: Any) -> Any:
    """The text model's config of a transformers model or (composite) config."""
    return configs_of(model_or_config)[1]


def plain_name(name: str) -> str:
    """Reduce a hub name or path to a key: "Somebody/Model3_5-30B-HF" is "model3.5-30b-hf"."""
    name = name.rstrip("/").rsplit("/", 1)[-1].lower()
    # "3_5" and "3.5" are both in use; a model type (model3_moe) keeps its underscore
    return re.sub(r"(?<=\d)_(?=\d)", ".", name)
