"""The words of the questions as a tokenizer, and InternVL's processor around it."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from fastmmoe.families.internvl_processor import InternVLProcessor
from fastmmoe.scenes.pictures import CELLS, COLOURS, SIZE

VISION_TOKENS = 100  # per picture: 20 x 20 patches, of which pixel shuffle joins 2 x 2

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
WORDS = (
    *(str(digit) for digit in range(10)),
    *COLOURS,
    *(f"r{row + 1}" for row in range(CELLS)),
    *(f"c{column + 1}" for column in range(CELLS)),
    *"digit digits at colour of row column in is there a how many are largest larger and ? yes no none".split(),
)
VOCABULARY = {token: index for index, token in enumerate(SPECIAL_TOKENS + WORDS)}

# no roles and no markers: a picture, then the question
CHAT_TEMPLATE = """\
{% for message in messages %}{% if message.content is string %}{{ message.content }}\
{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<IMG_CONTEXT>{% elif part.type == 'text' %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}{% endfor %}"""


def scene_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, or mark, in lower case; every other word is `<unk>`."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        padding_side="left",
        model_max_length=1024,
    )


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


def prompt(question: str) -> str:
    """What the processor takes as `text` beside one picture."""
    return f"<IMG_CONTEXT>{question}"
