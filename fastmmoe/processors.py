"""Load a checkpoint's processor, also on a machine without torchvision."""

from __future__ import annotations

import transformers
from transformers import AutoConfig, AutoProcessor
from transformers.utils import is_torchvision_available

from fastmmoe.models.deepseek_vl2 import DeepseekVLV2Processor


class InternVLProcessor(transformers.InternVLProcessor):
    """InternVL's processor for text and images.

    transformers' own class demands a video processor, which exists for torchvision only. A processor's parts are
    read off its constructor, so leaving `video_processor` out of it is all it takes: images and text go through the
    inherited code. The class keeps its name because a saved processor carries it.
    """

    def __init__(self, image_processor=None, tokenizer=None, image_seq_length: int = 256, chat_template=None):
        super().__init__(image_processor, tokenizer, None, image_seq_length, chat_template)


def load_processor(checkpoint: str):
    """The processor of `checkpoint`, a directory or a hub id.

    InternVL is loaded without its video part, the only one that needs torchvision; DeepSeek-VL2 needs none. Raises
    `OSError` when there is no such checkpoint, `ValueError` for one that is not supported, and `ImportError` when
    another family's processor does not load without torchvision.
    """
    own = {"internvl": InternVLProcessor, "deepseek_vl_v2": DeepseekVLV2Processor}
    model_type = AutoConfig.from_pretrained(checkpoint).model_type
    if model_type in own:
        return own[model_type].from_pretrained(checkpoint)
    try:
        return AutoProcessor.from_pretrained(checkpoint)
    except (ImportError, OSError, ValueError) as error:
        if is_torchvision_available():
            raise
        raise ImportError(
            f"no processor for {checkpoint} without torchvision: install the torchvision that matches "
            f"torch {transformers.utils.get_torch_version()} (https://pytorch.org/get-started)"
        ) from error
