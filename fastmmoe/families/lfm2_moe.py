"""LFM2-VL with an LFM2-MoE text model: short convolutions and full attention, of which the latter may prune."""

from typing import Any

import torch
from torch import nn

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
    checkpoint="LiquidAI/LFM2-8B-A1B",
)
