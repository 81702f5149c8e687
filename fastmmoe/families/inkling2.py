"""Inkling 2, whose residuals are attention over blocks of layers."""

from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import sigmoid_gate

INKLING2 = Family(
    title="Inkling-2",
    parent_type="inkling2",
    text_type="inkling2_text",
    placeholders=("image_token_id",),
    features=("pixel_values", "mm_encoder_outputs"),
    routing_options=sigmoid_gate,
    gate_class="Inkling2TopKRouter",
    expert_options=None,
    prunable_kinds=(),
    prune_obstacle=lambda *_: (
        "its residuals are made of the states of earlier blocks of layers, and all of them would have to be shortened"
    ),
    preset=Preset(
        supported="Inkling-2 (the name inkling-2-small)",
        names=r"inkling-2(-.*)?",
        num_experts_per_tok=8,
        prune_layers=(),
    ),
    checkpoint="thinkingmachines/Inkling-2-Small",
)
