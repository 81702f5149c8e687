"""The architecture of the small model: InternVL with a Qwen3-MoE language model, 3.0 M parameters."""

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen3MoeConfig,
)

from fastmmoe.scenes.pictures import SIZE
from fastmmoe.scenes.tokenizer import VISION_TOKENS, VOCABULARY


def model_config() -> InternVLConfig:
    """8 layers of 16 experts, top-4; 100 vision tokens per picture."""
    vision = InternVLVisionConfig(
        image_size=SIZE, patch_size=5, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, layer_scale_init_value=0.5,
    )  # fmt: skip
    text = Qwen3MoeConfig(
        vocab_size=len(VOCABULARY), hidden_size=96, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
        head_dim=24, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=72, intermediate_size=192,
        norm_topk_prob=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, initializer_range=0.06,
        max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=VOCABULARY["<eos>"], pad_token_id=VOCABULARY["<pad>"],
    )  # fmt: skip
    return InternVLConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=VOCABULARY["<IMG_CONTEXT>"],
        image_seq_length=VISION_TOKENS,
        tie_word_embeddings=False,
    )


def new_model(seed: int) -> InternVLForConditionalGeneration:
    """An untrained model, float32, with a generation config that stops at `<eos>`."""
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(model_config())
    nn.init.normal_(model.model.vision_tower.embeddings.position_embeddings, std=0.1)
    for layer in model.model.language_model.layers:
        nn.init.normal_(layer.mlp.gate.weight, std=0.15)  # logits of about unit size: routing is decided early
    with torch.random.fork_rng(devices=[]):
        # words as large as vision tokens: what attention brings from a hundred of those would drown smaller ones
        nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
        nn.init.normal_(model.lm_head.weight, std=0.06)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=8, eos_token_id=VOCABULARY["<eos>"], pad_token_id=VOCABULARY["<pad>"]
    )
    return model
