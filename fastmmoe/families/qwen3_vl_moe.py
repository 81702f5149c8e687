"""Qwen3-VL with experts."""

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import softmax_gate
from fastmmoe.families.tiling import grid_tilings

QWEN3_VL_MOE = Family(
    title="Qwen3-VL-MoE",
    parent_type="qwen3_vl_moe",
    text_type="qwen3_vl_moe_text",
    placeholders=("image_token_id", "video_token_id"),
    videos=True,
    routing_options=softmax_gate,
    gate_class="Qwen3VLMoeTextTopKRouter",
    injected=("visual_pos_masks", "deepstack_visual_embeds"),
    preset=Preset(
        supported="Qwen3-VL-MoE (a model or config; the name qwen3-vl-30b-a3b)",
        names=r"qwen3-vl-30b-a3b(-.*)?",
        num_experts_per_tok=8,
        prune_layers=(5, 8, 12),
    ),
    architectures={
        "qwen3-vl-30b-a3b": Architecture.of(
            num_hidden_layers=48,
            hidden_size=2048,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
        "qwen3-vl-235b-a22b": Architecture.of(
            num_hidden_layers=94,
            hidden_size=4096,
            num_attention_heads=64,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=1536,
        ),
    },
    checkpoint="Qwen/Qwen3-VL-30B-A3B-Instruct",
    tilings=grid_tilings,
)
