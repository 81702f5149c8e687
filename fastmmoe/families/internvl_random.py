"""A small InternVL that needs neither a GPU nor a download.

It has InternVL3.5's architecture (InternVL vision tower, pixel shuffle, Qwen3-MoE text model) and random
weights, so its answers mean nothing; its shapes, its tiling and its number of vision tokens per tile (256) are the
real ones. The processor is transformers' own, with a byte-level tokenizer built here.
"""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2Tokenizer,
    Qwen3MoeConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from fastmmoe.families.internvl_processor import InternVLProcessor

TILE = 448  # pixels
PATCH = 14  # pixels
TILE_TOKENS = (TILE // PATCH // 2) ** 2  # pixel shuffle joins 2 x 2 patches

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")

CHAT_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}\
{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<IMG_CONTEXT>
{% elif part.type == 'video' %}<video>
{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def random_processor() -> InternVLProcessor:
    """InternVL's processor with its real image settings and a tokenizer of one token per byte."""
    tokenizer = Qwen2Tokenizer(
        vocab=_vocabulary(),
        merges=[],
        eos_token="<|im_end|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        model_max_length=32768,
    )
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": TILE, "width": TILE},
        crop_to_patches=True,
        min_patches=1,
        max_patches=12,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return InternVLProcessor(image_processor, tokenizer, TILE_TOKENS, CHAT_TEMPLATE)


def random_config() -> InternVLConfig:
    """InternVL3.5's architecture in small: 16 layers of 16 experts, top-4; 28 M parameters."""
    vocabulary = _vocabulary()
    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            image_size=TILE,
            patch_size=PATCH,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
        ).to_dict(),
        text_config=Qwen3MoeConfig(
            vocab_size=len(vocabulary),
            hidden_size=256,
            num_hidden_layers=16,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=128,
            norm_topk_prob=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            bos_token_id=None,
            eos_token_id=vocabulary["<|im_end|>"],
            pad_token_id=vocabulary["<|endoftext|>"],
        ).to_dict(),
        image_token_id=vocabulary["<IMG_CONTEXT>"],
        image_seq_length=TILE_TOKENS,
        tie_word_embeddings=False,
    )


def random_model(seed: int = 0) -> InternVLForConditionalGeneration:
    """`random_config`'s model in evaluation mode, float32, on the CPU.

    Weights are drawn from `seed` at a scale that keeps activations near unit size and makes gates and attention
    decided, as trained ones are: with transformers' own initialisation (standard deviation 0.02) every expert and
    every token would be as good as any other. The caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(random_config()).eval()
        _draw_weights(model)
    vocabulary = _vocabulary()
    # a random model would mostly say bytes that are no text, or one of them for ever
    sayable = {*string.ascii_letters, *string.digits, *string.punctuation, "\u0120", "<|im_end|>"}  # u0120: a space
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=vocabulary["<|im_end|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
        suppress_tokens=[index for token, index in vocabulary.items() if token not in sayable],
        repetition_penalty=1.5,
    )
    return model


def save_random_model(directory: str | Path, seed: int = 0) -> Path:
    """Write the model and its processor as a checkpoint directory, as `from_pretrained` reads it (113 MB)."""
    directory = Path(directory)
    random_model(seed).save_pretrained(directory)
    random_processor().save_pretrained(directory)
    return directory


def _vocabulary() -> dict[str, int]:
    """Token -> id: one per byte, in the printable form byte-level tokenizers give it, then the special tokens."""
    return {token: index for index, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL_TOKENS])}


@torch.no_grad()
def _draw_weights(model: InternVLForConditionalGeneration) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.fill_(1.6)  # attention scores with a standard deviation of about 1.6 ** 2
        elif name.endswith("position_embeddings") or parameter.ndim == 1:
            continue  # biases 0, norms 1, layer scales as configured
        elif name.endswith("embed_tokens.weight"):
            nn.init.normal_(parameter)
        else:
            fan_in = parameter[0].numel() if "experts" not in name else parameter.shape[-1]
            gain = 2.0 if name.endswith("gate.weight") else 1.0  # gate logits with a standard deviation of about 2
            nn.init.normal_(parameter, std=gain * fan_in**-0.5)
