"""Qwen3.5 with experts: three layers of linear attention, then one of full attention, which may prune."""

from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import softmax_gate
from fastmmoe.families.tiling import grid_tilings

QWEN3_5_MOE = Family(
    title="Qwen3.5-MoE",
    parent_type="qwen3_5_moe",
    text_type="qwen3_5_moe_text",
    placeholders=("image_token_id", "video_token_id"),
    videos=True,
    routing_options=softmax_gate,
    gate_class="Qwen3_5MoeTopKRouter",
    preset=Preset(
        supported="Qwen3.5-MoE (the name qwen3.5-35b-a3b)",
        names=r"qwen3\.5-35b-a3b(-.*)?",
        num_experts_per_tok=8,
        prune_layers=(7, 11, 15),
    ),
    checkpoint="Qwen/Qwen3.5-35B-A3B",
    tilings=grid_tilings,
)
