"""The small model's processor: InternVL's, around the words of the questions."""

import json
from pathlib import Path

from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from fastmmoe.families.internvl_processor import InternVLProcessor
from fastmmoe.scenes.pictures import SIZE
from fastmmoe.scenes.tokenizer import VISION_TOKENS, scene_tokenizer

# no roles and no markers: a picture, then the question
CHAT_TEMPLATE = """\
{% for message in messages %}{% if message.content is string %}{{ message.content }}\
{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<IMG_CONTEXT>{% elif part.type == 'text' %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}{% endfor %}"""


def scene_processor() -> InternVLProcessor:
    """Pictures of any size become 100 x 100 pixels in -1..1, one tile; a prompt is `<IMG_CONTEXT>` and a question."""
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        crop_to_patches=False,
        max_patches=1,  # the processor's own default for crop_to_patches is True
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return InternVLProcessor(image_processor, scene_tokenizer(), VISION_TOKENS, CHAT_TEMPLATE)


def save_processor(directory: str | Path) -> None:
    """Write `scene_processor()` so that `load_processor` reads it, and `AutoProcessor` where there is torchvision.

    InternVL's own class wants settings for video too, which this package's class does not have.
    """
    processor = scene_processor()
    processor.save_pretrained(directory)
    path = Path(directory) / "processor_config.json"
    settings = json.loads(path.read_text())
    image = processor.image_processor
    settings["video_processor"] = {
        "video_processor_type": "InternVLVideoProcessor",
        "size": dict(image.size),
        "image_mean": image.image_mean,
        "image_std": image.image_std,
    }
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
