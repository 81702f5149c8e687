"""InternVL's processor on a machine without torchvision."""

from typing import Any

import transformers


class InternVLProcessor(transformers.InternVLProcessor):
    """InternVL's processor for text and images.

    transformers' own class demands a video processor, which exists for torchvision only. A processor's parts are
    read off its constructor, so leaving `video_processor` out of it is all it takes: images and text go through the
    inherited code. The class keeps its name because a saved processor carries it.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, None, image_seq_length, chat_template)
