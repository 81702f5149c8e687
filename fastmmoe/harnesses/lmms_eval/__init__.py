"""FastMMoE as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), by its entry point for plugins."""

from __future__ import annotations

NAME = "fastmmoe"


def manifest():
    """What lmms-eval registers: `lmms-eval eval --model fastmmoe --model_args pretrained=DIR,retention=0.5 ...`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(NAME, chat_class_path=f"{__name__}.model.FastMMoE")
