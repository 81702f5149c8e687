"""Checkpoint directories as the hub has them, in small: random weights, a trained tokenizer, a real processor's files.

`save(name, directory)` writes one; `CHECKPOINTS` lists them. The files are those of the released checkpoints (their
names, keys and chat templates' structure), the numbers are small: patches of 4 pixels, 2 x 2 of which make a token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedTokenizerFast

from . import tiny_families

TEXT = (
    "What is in this picture? Describe the photograph in one sentence.",
    "The picture shows a cat that looks at a red square and two blue circles.",
    "What happens in this video? The red square moves from left to right.",
)
TOKEN = 8  # pixels: 2 x 2 patches of 4
NORMAL = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True, "rescale_factor": 1 / 255}
PATCHES = NORMAL | {"patch_size": 4, "merge_size": 2, "do_resize": True, "do_normalize": True, "do_convert_rgb": True}


def build_tokenizer(special: tuple[str, ...], template: str, **options) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `TEXT`; the special tokens come last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=4096, padding_side="left", **options)
    made.add_special_tokens({"extra_special_tokens": list(special)})
    made.chat_template = template
    return made


@dataclass(frozen=True)
class Checkpoint:
    """One family's files.

    Attributes:
        special: the tokenizer's special tokens, the end of a turn first.
        ids: attribute of the config -> the special token that it holds the id of.
        template: the chat template.
        image, video: what `preprocessor_config.json` and `video_preprocessor_config.json` hold.
        processor: what `processor_config.json` holds; None: no such file.
        named: the tokenizer's attributes that name special tokens.
        layers: how many; None: as many as the tiny model has.
    """

    special: tuple[str, ...]
    ids: dict[str, str]
    template: str
    image: dict
    video: dict | None = None
    processor: dict | None = None
    named: dict[str, str] | None = None
    layers: int | None = None


def turns(start: str, end: str, image: str, video: str, before: str = "", answer: str = "") -> str:
    """A chat template whose turns are `start`, the role and a line break, and the content, then `end`."""
    return (
        before
        + "{%- for message in messages -%}"
        + start
        + "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
        "{%- for part in message.content -%}"
        "{%- if part.type == 'image' -%}" + image + "{%- elif part.type == 'video' -%}" + video + "{%- else -%}"
        "{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
        + end
        + "{%- endfor -%}{%- if add_generation_prompt -%}" + answer + "{%- endif -%}"
    )  # fmt: skip


IM = dict(
    start="{{- '<|im_start|>' + message.role + '\\n' -}}",
    end="{{- '<|im_end|>\\n' -}}",
    answer="{{- '<|im_start|>assistant\\n' -}}",
)

CHECKPOINTS = {
    "internvl_qwen3_moe": Checkpoint(
        special=("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        ids={"image_token_id": "<IMG_CONTEXT>"},
        template=turns(**IM, image="{{- '<IMG_CONTEXT>\\n' -}}", video="{{- '<video>\\n' -}}"),
        image=NORMAL
        | {
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "processor_class": "InternVLProcessor",
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 12,
            "size": {"height": 32, "width": 32},
        },
        video=NORMAL
        | {
            "video_processor_type": "InternVLVideoProcessor",
            "processor_class": "InternVLProcessor",
            "size": {"height": 32, "width": 32},
        },
        processor={"processor_class": "InternVLProcessor", "image_seq_length": 16},
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        layers=13,  # a preset prunes at 5, 8 and 12
    ),
    "qwen3_vl_moe": Checkpoint(
        special=(
            "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>",
        ),
        ids={
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        template=turns(
            **IM,
            image="{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}",
            video="{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}",
        ),
        image=PATCHES
        | {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
            "temporal_patch_size": 2,
            "size": {"shortest_edge": 4 * TOKEN**2, "longest_edge": 48 * TOKEN**2},
        },
        video=PATCHES
        | {
            "video_processor_type": "Qwen3VLVideoProcessor",
            "processor_class": "Qwen3VLProcessor",
            "temporal_patch_size": 2,
            "fps": 2,
            "size": {"shortest_edge": 4 * TOKEN**2, "longest_edge": 2 * 3 * 24 * TOKEN**2},
        },
    ),
    "glm4v_moe": Checkpoint(
        special=(
            "<|user|>", "<|assistant|>", "<|endoftext|>", "[gMASK]", "<sop>", "<|begin_of_image|>", "<|end_of_image|>",
            "<|image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|video|>",
        ),
        ids={
            "image_token_id": "<|image|>",
            "video_token_id": "<|video|>",
            "image_start_token_id": "<|begin_of_image|>",
            "image_end_token_id": "<|end_of_image|>",
            "video_start_token_id": "<|begin_of_video|>",
            "video_end_token_id": "<|end_of_video|>",
        },
        template=turns(
            before="{{- '[gMASK]<sop>' -}}",
            start="{{- '<|' + message.role + '|>\\n' -}}",
            end="",
            answer="{{- '<|assistant|>\\n' -}}",
            image="{{- '<|begin_of_image|><|image|><|end_of_image|>' -}}",
            video="{{- '<|begin_of_video|><|video|><|end_of_video|>' -}}",
        ),
        image=PATCHES
        | {
            "image_processor_type": "Glm4vImageProcessor",
            "processor_class": "Glm4vProcessor",
            "temporal_patch_size": 2,
            "size": {"shortest_edge": 4 * TOKEN**2, "longest_edge": 2 * 48 * TOKEN**2},
        },
        video=PATCHES
        | {
            "video_processor_type": "Glm4vVideoProcessor",
            "processor_class": "Glm4vProcessor",
            "temporal_patch_size": 2,
            "fps": 2,
            "size": {"shortest_edge": 4 * TOKEN**2, "longest_edge": 2 * 3 * 24 * TOKEN**2},
        },
    ),
    "kimi_k25": Checkpoint(
        special=(
            "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "[EOS]", "<|media_begin|>",
            "<|media_content|>", "<|media_end|>", "<|media_pad|>", "<|kimi_k25_video_placeholder|>",
        ),
        ids={"image_token_id": "<|media_pad|>", "video_token_id": "<|kimi_k25_video_placeholder|>"},
        template=turns(
            start="{{- '<|im_' + message.role + '|>' + message.role + '<|im_middle|>' -}}",
            end="{{- '<|im_end|>' -}}",
            answer="{{- '<|im_assistant|>assistant<|im_middle|>' -}}",
            image="{{- '<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\\n' -}}",
            video="{{- '<|kimi_k25_video_placeholder|>' -}}",
        ),
        image=PATCHES
        | {
            "image_processor_type": "Kimi_K25ImageProcessor",
            "processor_class": "Kimi_K25Processor",
            "max_patches": 4 * 48,
            "size": {"max_height": 512, "max_width": 512},
        },
        video=PATCHES
        | {
            "video_processor_type": "Kimi_K25VideoProcessor",
            "processor_class": "Kimi_K25Processor",
            # transformers 5.23 fails on several frames in a chunk: its features do not fill the tokens it expects
            "temporal_patch_size": 1,
            "fps": 2,
            "max_patches": 4 * 24,
            "size": {"max_height": 512, "max_width": 512},
        },
    ),
    "mistral3_mistral4": Checkpoint(
        special=("</s>", "<s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>"),
        ids={"image_token_index": "[IMG]"},
        template=turns(
            before="{{- '<s>' -}}",
            start="{{- '[INST]' if message.role == 'user' else '' -}}",
            end="{{- '[/INST]' if message.role == 'user' else '</s>' -}}",
            image="{{- '[IMG]' -}}",
            video="",
        ),
        image=NORMAL
        | {
            "image_processor_type": "PixtralImageProcessorFast",
            "processor_class": "PixtralProcessor",
            "do_resize": True,
            "do_normalize": True,
            "patch_size": 4,
            "size": {"longest_edge": 64},
        },
        processor={
            "processor_class": "PixtralProcessor",
            "patch_size": 4,
            "spatial_merge_size": 2,
            "image_token": "[IMG]",
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
        },
        layers=6,
    ),
}  # fmt: skip
CHECKPOINTS["qwen3_5_moe"] = CHECKPOINTS["qwen3_vl_moe"]  # the same files

# their processors, or the classes for pictures in them, ask for torchvision
NEED_TORCHVISION = ("kimi_k25", "mistral3_mistral4")


Sizes = dict[str, dict[str, object]]


def build_model(
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    sizes: Sizes | None = None,
    files: Checkpoint | None = None,
) -> nn.Module:
    """The tiny model of that family, with the tokenizer's vocabulary.

    `sizes` has other values by part of its config, "" for the whole; `files` stands for those in `CHECKPOINTS`.
    """
    files = files or CHECKPOINTS[name]
    config = tiny_families.FAMILIES[name](seed)[0].config
    config.text_config.vocab_size = len(tokenizer)
    for attribute, token in files.ids.items():
        setattr(config, attribute, tokenizer.convert_tokens_to_ids(token))
    if files.layers is not None:
        config.text_config.num_hidden_layers = files.layers
    for part, values in (sizes or {}).items():
        for attribute, value in values.items():
            setattr(getattr(config, part) if part else config, attribute, value)
    end = tokenizer.convert_tokens_to_ids(files.special[0])
    config.text_config.eos_token_id, config.text_config.pad_token_id = end, None
    model = AutoModelForImageTextToText.from_config(config).eval()
    tiny_families.randomise(model, seed)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end, do_sample=False)
    return model


def save(
    name: str, directory: Path, seed: int = 0, sizes: Sizes | None = None, files: Checkpoint | None = None
) -> Path:
    """Write a checkpoint; `name` as in `tiny_families.FAMILIES`, `sizes` and `files` as in `build_model`."""
    files = files or CHECKPOINTS[name]
    directory.mkdir(parents=True, exist_ok=True)
    named = {"extra_special_tokens": files.named} if files.named else {}
    tokenizer = build_tokenizer(files.special, files.template, eos_token=files.special[0], **named)
    build_model(name, tokenizer, seed, sizes, files).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    written = {
        "preprocessor_config.json": files.image,
        "video_preprocessor_config.json": files.video,
        "processor_config.json": files.processor,
    }
    for file, settings in written.items():
        if settings is not None:
            (directory / file).write_text(json.dumps(settings, indent=2))
    return directory
