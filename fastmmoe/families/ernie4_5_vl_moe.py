"""ERNIE-4.5-VL, where vision tokens have a gate and experts of their own."""

from typing import Any

import torch
from torch import nn

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import softmax_gate
from fastmmoe.families.tiling import grid_tilings


def _routing_options(gate: nn.Module) -> dict[str, Any]:
    bias = gate.moe_statics.e_score_correction_bias
    if bias.is_meta:  # offloaded, and loaded when its module is called, which adds it
        bias = gate.moe_statics(torch.zeros(bias.shape))
    return softmax_gate(gate) | {"correction_bias": bias[0]}


ERNIE4_5_VL_MOE = Family(
    title="ERNIE-4.5-VL",
    parent_type="ernie4_5_vl_moe",
    text_type="ernie4_5_vl_moe_text",
    norms_heads=False,
    placeholders=("image_token_id", "video_token_id"),
    videos=True,
    gate="vision_moe.gate",
    experts="vision_moe.experts",
    vision_only=True,
    routing_options=_routing_options,
    gate_class="Ernie4_5_VLMoeMoeTopKRouter",
    linear=None,
    per_token=("moe_mm_token_type_ids",),
    rows_by=(3,),
    preset=Preset(
        supported="ERNIE-4.5-VL (a model or config; the name ernie-4.5-vl-28b-a3b)",
        names=r"ernie-4\.5-vl-28b-a3b(-.*)?",
        num_experts_per_tok=6,
        prune_layers=(3, 5, 7),
    ),
    architectures={
        "ernie-4.5-vl-28b-a3b": Architecture.of(
            norms_heads=False,
            num_hidden_layers=28,
            hidden_size=2560,
            num_attention_heads=20,
            num_key_value_heads=4,
            head_dim=128,
            moe_num_experts=64,
            moe_k=6,
            moe_intermediate_size=(1536, 512),
            intermediate_size=12288,
            moe_num_shared_experts=2,
            first_k_dense_replace=1,
        )
    },
    checkpoint="baidu/ERNIE-4.5-VL-28B-A3B-PT",
    tilings=grid_tilings,
)
