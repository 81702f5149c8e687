"""The pages' model's processor: Qwen3-VL's, around the words of the questions."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from fastmmoe.families.images_only import images_only
from pages.model import MERGE, PATCH, SIZE
from pages.words import page_tokenizer

# no roles and no markers: a page, then the question
CHAT_TEMPLATE = """\
{% for message in messages %}{% if message.content is string %}{{ message.content }}\
{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<vision><image></vision>{% elif part.type == 'text' %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}{% endfor %}"""

VIDEO = {"video_processor_type": "Qwen3VLVideoProcessor", "patch_size": PATCH, "merge_size": MERGE}


def page_processor() -> ProcessorMixin:
    """Pictures become as many pixels as a page has; a prompt is `<vision><image></vision>` and a question."""
    area = {"shortest_edge": SIZE**2, "longest_edge": SIZE**2}
    half = [0.5, 0.5, 0.5]
    image_processor = Qwen2VLImageProcessorPil(
        size=area, patch_size=PATCH, merge_size=MERGE, image_mean=half, image_std=half
    )
    return images_only(Qwen3VLProcessor)(image_processor, page_tokenizer(), chat_template=CHAT_TEMPLATE)


def save_processor(directory: str | Path) -> None:
    """Write `page_processor()` so that `load_processor` reads it, and `AutoProcessor` where there is torchvision."""
    page_processor().save_pretrained(directory)
    path = Path(directory) / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["video_processor"] = VIDEO
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
