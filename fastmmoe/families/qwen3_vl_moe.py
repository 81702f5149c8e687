"""Qwen3-VL with experts."""

from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import softmax_gate
from fastmmoe.families.qwen3_moe import QWEN3_30B_A3B, QWEN3_235B_A22B
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
        "qwen3-vl-30b-a3b": QWEN3_30B_A3B,
        "qwen3-vl-235b-a22b": QWEN3_235B_A22B,
    },
    checkpoint="Qwen/Qwen3-VL-30B-A3B-Instruct",
    tilings=grid_tilings,
)
