"""Tiny checkpoints that vLLM serves on a CPU: heads of 32, widths by which its kernels divide, the hub's weight order.

No matrix of experts is square: its order could not be told.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests.model import tiny_checkpoints
from tests.model.tiny_checkpoints import CHECKPOINTS, IM, Checkpoint, turns

TEXT = dict(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_hidden_layers=8,
    intermediate_size=64, moe_intermediate_size=96, num_experts=8, num_experts_per_tok=4, norm_topk_prob=True,
    max_position_embeddings=1024,
)  # fmt: skip
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4], "mrope_interleaved": True}
SIZES = {
    "qwen3_vl_moe": {"text_config": TEXT | {"rope_parameters": QWEN_ROPE}, "vision_config": {"out_hidden_size": 64}},
    "internvl_qwen3_moe": {"text_config": TEXT},
    "internvl_gpt_oss": {
        "text_config": TEXT
        | {
            "intermediate_size": 96,
            "layer_types": ["sliding_attention", "full_attention"] * 4,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        }
    },
    "glm4v_moe": {
        "text_config": TEXT
        | {
            "use_qk_norm": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
                "partial_rotary_factor": 0.5,
            },
        },
        "vision_config": {"out_hidden_size": 64, "hidden_size": 64, "intermediate_size": 64},
    },
    "aria": {
        # its processor makes every image 980 pixels wide
        "": {"projector_patch_to_query_dict": {49: 16}},
        "text_config": TEXT | {"intermediate_size": 96, "moe_num_experts": 8, "moe_topk": 4},
        "vision_config": {"image_size": 980, "patch_size": 140},
    },
    "qwen3_omni_moe_thinker": {
        "text_config": TEXT | {"rope_parameters": QWEN_ROPE, "tie_word_embeddings": False},
        "vision_config": {"out_hidden_size": 64, "image_size": 32, "apply_vit_abs_pos_embed": True},
        "audio_config": {"output_dim": 64},
    },
}
# files of checkpoints that only these tests have
FILES = {
    "internvl_gpt_oss": CHECKPOINTS["internvl_qwen3_moe"],
    "aria": Checkpoint(
        special=("<|im_end|>", "<|im_start|>", "<|img|>", "<fim_prefix>", "<fim_suffix>"),
        ids={"image_token_index": "<|img|>"},
        template=turns(**IM, image="{{- '<fim_prefix><|img|><fim_suffix>' -}}", video=""),
        # as wide as high: vLLM's tower lets patches see padding, which transformers' masks
        image={
            "image_processor_type": "AriaImageProcessor",
            "processor_class": "AriaProcessor",
            "min_image_size": 980,
        },
        processor={"processor_class": "AriaProcessor", "size_conversion": {"980": 16}},
        named={"image_token": "<|img|>"},
    ),
    "qwen3_omni_moe_thinker": replace(
        CHECKPOINTS["qwen3_vl_moe"],
        special=(*CHECKPOINTS["qwen3_vl_moe"].special, "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"),
        ids={
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "audio_token_id": "<|audio_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "audio_start_token_id": "<|audio_start|>",
        },
        image=CHECKPOINTS["qwen3_vl_moe"].image
        | {"processor_class": "Qwen3OmniMoeProcessor", "feature_extractor_type": "WhisperFeatureExtractor"},
        video=CHECKPOINTS["qwen3_vl_moe"].video
        | {"processor_class": "Qwen3OmniMoeProcessor", "video_processor_type": "Qwen2VLVideoProcessor"},
        named={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "audio_token": "<|audio_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
            "audio_bos_token": "<|audio_start|>",
            "audio_eos_token": "<|audio_end|>",
        },
    ),
}
# of an image, in the processor's settings
MOST_TOKENS = {"qwen3_vl_moe": 256}
# stored with inputs first, as the hub has them
TRANSPOSED = {"qwen3_vl_moe": (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")}
# of which the hub has no checkpoint by itself: the whole's model type and architecture, and the part's name in it
PART_OF = {"qwen3_omni_moe_thinker": ("qwen3_omni_moe", "Qwen3OmniMoeForConditionalGeneration", "thinker")}


def save(name: str, directory: Path, seed: int = 0) -> Path:
    """Write a checkpoint that both transformers and vLLM read."""
    tiny_checkpoints.save(name, directory, seed, SIZES[name], FILES.get(name))
    weights = directory / "model.safetensors"
    stored = load_file(weights)
    for key, tensor in stored.items():
        if key.endswith(TRANSPOSED.get(name, ())):
            stored[key] = tensor.mT.contiguous()
    if name in PART_OF:
        kind, architecture, part = PART_OF[name]
        inner = {f"{part}_config": AutoConfig.from_pretrained(directory).to_dict()}
        AutoConfig.for_model(kind, architectures=[architecture], **inner).save_pretrained(directory)
        stored = {f"{part}.{key}": tensor for key, tensor in stored.items()}
    save_file(stored, weights, {"format": "pt"})
    if name in MOST_TOKENS:
        settings = directory / "preprocessor_config.json"
        values = json.loads(settings.read_text())
        values["size"]["longest_edge"] = MOST_TOKENS[name] * tiny_checkpoints.TOKEN**2
        settings.write_text(json.dumps(values))
    return directory
