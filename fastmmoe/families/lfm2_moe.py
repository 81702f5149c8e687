"""LFM2-VL with an LFM2-MoE text model: short convolutions and full attention, of which the latter may prune."""

from typing import Any

import torch
from torch import nn

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset


def _routing_options(gate: nn.Module, expert_bias: torch.Tensor | None = None) -> dict[str, Any]:
    return {
        "top_k": gate.top_k,
        "scoring": "sigmoid",
        "norm_topk_prob": gate.norm_topk_prob,
        "correction_bias": expert_bias,
        "routed_scaling_factor": float(gate.routed_scaling_factor),
    }


LFM2_VL_LFM2_MOE = Family(
    title="LFM2-VL with LFM2-MoE",
    parent_type="lfm2_vl",
    text_type="lfm2_moe",
    placeholders=("image_token_id",),
    features=("pixel_values", "mm_encoder_outputs"),
    norm="ffn_norm",
    moe="feed_forward",
    routing_options=_routing_options,
    gate_arguments=lambda moe: (moe.expert_bias if moe.use_expert_bias else None,),
    gate_class="Lfm2MoeTopKRouter",
    preset=Preset(
        supported="LFM2-VL with LFM2-MoE (the name lfm2-8b-a1b)",
        names=r"lfm2(-vl)?-8b-a1b(-.*)?",
        num_experts_per_tok=4,
        prune_layers=(2, 6, 10),
    ),
    architectures={
        "lfm2-8b-a1b": Architecture.of(
            num_hidden_layers=24,
            hidden_size=2048,
            layer_types=["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)],
            conv_L_cache=3,
            num_attention_heads=32,
            num_key_value_heads=8,
            num_experts=32,
            num_experts_per_tok=4,
            moe_intermediate_size=1792,
            intermediate_size=7168,
            num_dense_layers=2,
        )
    },
    checkpoint="LiquidAI/LFM2-8B-A1B",
)
