"""Muse Spark: norms and gates around every residual, of which full-attention layers may prune."""

import torch
from torch import nn

from fastmmoe.families.architecture import Architecture, gate_weights
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import sigmoid_gate
from fastmmoe.families.tiling import grid_tilings


def _combine(layer: nn.Module, residual: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """A norm behind the MoE, and a gate on the residual stream."""
    return layer.post_feedforward_residual_gate(residual, layer.post_feedforward_layernorm(output))


MUSE_SPARK = Family(
    title="Muse-Spark",
    parent_type="muse_spark",
    text_type="muse_spark_text",
    placeholders=("image_token_id", "video_token_id"),
    videos=True,
    mixer_weights=gate_weights,
    norm="pre_feedforward_layernorm",
    routing_options=sigmoid_gate,
    gate_class="MuseSparkTopkRouter",
    linear=lambda gate: {"logit_scale": float(gate.output_multiplier)},
    own_experts=True,
    combine=_combine,
    preset=Preset(
        supported="Muse-Spark (the name muse-spark-open-816b-a42b)",
        names=r"muse-spark(-.*)?",
        num_experts_per_tok=8,
        prune_layers=(9, 13, 17),
    ),
    architectures={
        "muse-spark-open-816b-a42b": Architecture.of(
            mixer_weights=gate_weights,
            num_hidden_layers=62,
            hidden_size=8192,
            layer_types=["full_attention" if i % 4 == 1 else "sliding_attention" for i in range(62)],
            sliding_window=2048,
            num_attention_heads=128,
            num_key_value_heads=16,
            head_dim=64,
            num_local_experts=256,
            num_experts_per_tok=8,
            moe_hidden_size=4096,
            moe_intermediate_size=4096,
        )
    },
    checkpoint="Muse-Spark-Open-816B-A42B",
    tilings=grid_tilings,
)
