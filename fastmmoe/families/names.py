"""What a model is called, and which of its configs describes the language model."""

import re
from typing import Any


def text_config_of(model_or_config: Any) -> Any:
    """The text model's config of a transformers model or (composite) config."""
    config = getattr(model_or_config, "config", model_or_config)
    return getattr(config, "text_config", None) or config


def plain_name(name: str) -> str:
    """Reduce a hub name or path to a key: "Somebody/Model3_5-30B-HF" is "model3.5-30b-hf"."""
    name = name.rstrip("/").rsplit("/", 1)[-1].lower()
    # "3_5" and "3.5" are both in use; a model type (model3_moe) keeps its underscore
    return re.sub(r"(?<=\d)_(?=\d)", ".", name)
