"""The architecture of the pages' model: Qwen3-VL-MoE with M-RoPE and DeepStack, small."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeTextConfig,
    Qwen3VLMoeVisionConfig,
)

from pages.words import SIDE, VOCABULARY

PATCH, MERGE = 16, 2
TOKEN = PATCH * MERGE  # pixels per side of what a vision token shows
SIZE = SIDE * TOKEN
VISION_TOKENS = SIDE**2
HIDDEN = 128


def model_config() -> Qwen3VLMoeConfig:
    """8 layers of 16 experts, top-4; 324 vision tokens per page; one DeepStack level."""
    vision = Qwen3VLMoeVisionConfig(
        depth=2, hidden_size=128, num_heads=4, intermediate_size=384, patch_size=PATCH, spatial_merge_size=MERGE,
        temporal_patch_size=2, in_channels=3, out_hidden_size=HIDDEN, num_position_embeddings=(SIDE * MERGE) ** 2,
        deepstack_visual_indexes=[0], hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = Qwen3VLMoeTextConfig(
        vocab_size=len(VOCABULARY), hidden_size=HIDDEN, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=48,
        intermediate_size=256, rope_parameters=rope, initializer_range=0.06, max_position_embeddings=2048,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=VOCABULARY["<eos>"],
        pad_token_id=VOCABULARY["<pad>"],
    )  # fmt: skip
    return Qwen3VLMoeConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=VOCABULARY["<image>"],
        video_token_id=VOCABULARY["<video>"],
        vision_start_token_id=VOCABULARY["<vision>"],
        vision_end_token_id=VOCABULARY["</vision>"],
        tie_word_embeddings=False,
    )


def new_model(seed: int) -> Qwen3VLMoeForConditionalGeneration:
    """An untrained model, float32, with a generation config that stops at `<eos>`.

    Attention starts as a look-up, which plain random weights took too long to become: half of the query heads look for
    vision tokens that show what they stand on themselves, and all say what they look at.
    """
    torch.manual_seed(seed)
    model = Qwen3VLMoeForConditionalGeneration(model_config())
    nn.init.normal_(model.model.visual.pos_embed.weight, std=0.2)
    table = model.get_input_embeddings().weight
    nn.init.normal_(table, std=1.0)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            nn.init.normal_(layer.mlp.gate.weight, std=0.15)  # logits of about unit size: routing is decided early
            _start_as_look_up(layer.self_attn)
        # a word is said by the direction in which it is heard
        model.lm_head.weight.copy_(0.06 * table)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=8, eos_token_id=VOCABULARY["<eos>"], pad_token_id=VOCABULARY["<pad>"]
    )
    return model


def _start_as_look_up(attention: nn.Module) -> None:
    """Vision tokens show a word by minus its embedding (`ideal_features`): so a word does not find itself."""
    size = attention.head_dim
    keys, values = (one.weight.unflatten(0, (-1, size)) for one in (attention.k_proj, attention.v_proj))
    groups = attention.num_key_value_groups
    queries = attention.q_proj.weight.unflatten(0, (-1, groups, size))
    queries[:, 0] = -keys
    outputs = attention.o_proj.weight.unflatten(1, (-1, groups, size))  # [H, heads of KV, groups, size]
    outputs.copy_(-values.permute(2, 0, 1).unsqueeze(2))
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.fill_(1.7)  # sharp enough to find one of hundreds
