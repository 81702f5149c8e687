"""Muse Spark: norms and gates around every residual, of which full-attention layers may prune."""

import torch
from torch import nn

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
    norm="pre_feedforward_layernorm",
    routing_options=sigmoid_gate,
    gate_class="MuseSparkTopkRouter",
    linear=None,
    expert_options=None,
    combine=_combine,
    preset=Preset(
        supported="Muse-Spark (the name muse-spark-open-816b-a42b)",
        names=r"muse-spark(-.*)?",
        num_experts_per_tok=8,
        prune_layers=(7, 11, 15),
    ),
    checkpoint="meta-llama/Muse-Spark-Open-816B-A42B",
    tilings=grid_tilings,
)
