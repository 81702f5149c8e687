"""Gemma 4 with experts, whose sliding layers see every image both ways."""

import torch
from torch import nn

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset
from fastmmoe_kernels import GateOutput, RoutingOutput


def _scaled_by_expert(gate: nn.Module, logits: torch.Tensor, routing: RoutingOutput | GateOutput) -> tuple:
    """The weights are normalised first and then scaled expert by expert; an empty slot has weight 0."""
    scale = gate.per_expert_scale[routing.ids.clamp_max(len(gate.per_expert_scale) - 1).long()]
    return logits.exp(), routing.weights * scale, routing.ids


GEMMA4 = Family(
    title="Gemma-4",
    parent_type="gemma4",
    text_type="gemma4_text",
    placeholders=("image_token_id", "video_token_id"),
    videos=True,
    moe="",
    gate="router",
    routing_options=lambda gate: {"top_k": gate.config.top_k_experts, "scoring": "softmax", "norm_topk_prob": True},
    gate_class="Gemma4TextRouter",
    linear=None,
    logits=lambda output: output[0].log(),
    gate_output=_scaled_by_expert,
    top_k="top_k_experts",
    prunable_kinds=(),
    prune_obstacle=lambda *_: "later layers see images both ways, by masks of the longer sequence",
    preset=Preset(
        supported="Gemma-4 (the name gemma-4-26b-a4b)",
        names=r"gemma-4-26b-a4b(-.*)?",
        num_experts_per_tok=8,
        prune_layers=(),
    ),
    architectures={
        "gemma-4-26b-a4b": Architecture.of(
            num_hidden_layers=30,
            hidden_size=2816,
            layer_types=["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(30)],
            sliding_window=1024,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=256,
            # of the full layers, whose keys are their values too
            num_global_key_value_heads=2,
            global_head_dim=512,
            attention_k_eq_v=True,
            enable_moe_block=True,
            num_experts=128,
            top_k_experts=8,
            moe_intermediate_size=704,
            intermediate_size=2112,
        )
    },
    checkpoint="google/gemma-4-26B-A4B-it",
)
