"""Qwen3.5 with experts: three layers of linear attention, then one of full attention, which may prune."""

from fastmmoe.families.architecture import Architecture, gate_weights
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import softmax_gate
from fastmmoe.families.tiling import grid_tilings

QWEN3_5_MOE = Family(
    title="Qwen3.5-MoE",
    parent_type="qwen3_5_moe",
    text_type="qwen3_5_moe_text",
    placeholders=("image_token_id", "video_token_id"),
    videos=True,
    mixer_weights=gate_weights,
    routing_options=softmax_gate,
    gate_class="Qwen3_5MoeTopKRouter",
    preset=Preset(
        supported="Qwen3.5-MoE (the name qwen3.5-35b-a3b)",
        names=r"qwen3\.5-35b-a3b(-.*)?",
        num_experts_per_tok=8,
        prune_layers=(7, 11, 15),
    ),
    architectures={
        "qwen3.5-35b-a3b": Architecture.of(
            mixer_weights=gate_weights,
            num_hidden_layers=40,
            hidden_size=2048,
            layer_types=["full_attention" if i % 4 == 3 else "linear_attention" for i in range(40)],
            num_attention_heads=16,
            num_key_value_heads=2,
            partial_rotary_factor=0.25,
            head_dim=256,
            linear_conv_kernel_dim=4,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            linear_num_key_heads=16,
            linear_num_value_heads=32,
            num_experts=256,
            num_experts_per_tok=8,
            moe_intermediate_size=512,
            shared_expert_intermediate_size=512,
        )
    },
    checkpoint="Qwen/Qwen3.5-35B-A3B",
    tilings=grid_tilings,
)
