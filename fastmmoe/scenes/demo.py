"""The trained model of `fastmmoe.scenes` and a picture it has not seen, with questions and their answers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from fastmmoe.families.checkpoint import load_model
from fastmmoe.families.processors import load_processor
from fastmmoe.methods import FastMMoEConfig
from fastmmoe.scenes import CHECKPOINT, EXAMPLE, Question

if TYPE_CHECKING:
    from PIL.Image import Image


def demo_model() -> tuple[PreTrainedModel, Any]:
    """The model, float32 on the CPU in evaluation mode, and its processor."""
    return load_model(str(CHECKPOINT), "float32"), load_processor(str(CHECKPOINT))


def demo_example() -> tuple[Image, list[Question]]:
    """A picture of the test split, 100 x 100, and a question of every type about it."""
    from PIL import Image

    questions = [Question(**question) for question in json.loads((EXAMPLE / "questions.json").read_text())]
    return Image.open(EXAMPLE / "picture.png").convert("RGB"), questions


def demo_config(retention: float) -> FastMMoEConfig:
    """Half the experts for vision tokens, and pruning at two layers of eight."""
    prune = {} if retention == 1.0 else dict(prune_layers=(2, 4), retention=retention)
    return FastMMoEConfig(vision_top_k=2, reduction_layer=2, **prune)
