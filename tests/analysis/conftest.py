"""A tiny random checkpoint that answers scene questions (wrongly), and its session."""

import pytest
import torch
from model.tiny import spread
from quality.processor import scene_processor
from transformers import GenerationConfig, InternVLConfig, InternVLForConditionalGeneration, Qwen3MoeConfig

from fastmmoe.scenes.tokenizer import VISION_TOKENS, VOCABULARY
from fastmmoe.study.study import Settings


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A directory: 5 layers of 8 experts, top-4, hidden 32, on the scenes' processor; float32."""
    text = Qwen3MoeConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=16, intermediate_size=32,
        norm_topk_prob=True, max_position_embeddings=256, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        pad_token_id=VOCABULARY["<pad>"], bos_token_id=None, eos_token_id=VOCABULARY["<eos>"],
    )  # fmt: skip
    vision = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, image_size=100, patch_size=5
    )
    config = InternVLConfig(
        vision_config=vision, text_config=text.to_dict(), image_token_id=VOCABULARY["<IMG_CONTEXT>"],
        image_seq_length=VISION_TOKENS, downsample_ratio=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    model = InternVLForConditionalGeneration(config).eval()
    spread(model, seed=1)
    with torch.no_grad():  # an image token is nothing to say; the end is, now and then
        model.lm_head.weight[VOCABULARY["<IMG_CONTEXT>"]] = 0.0
        model.lm_head.weight[VOCABULARY["<eos>"]] *= 1.5
    model.generation_config = GenerationConfig(
        eos_token_id=VOCABULARY["<eos>"], pad_token_id=VOCABULARY["<pad>"], do_sample=False
    )
    directory = tmp_path_factory.mktemp("analysis") / "checkpoint"
    model.save_pretrained(directory)
    scene_processor().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def settings(checkpoint):
    return Settings(model=str(checkpoint), n=14, dev_n=8, batch=6, max_new_tokens=4, rounds=2, timing_batch=3)
