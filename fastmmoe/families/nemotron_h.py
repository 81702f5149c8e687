"""Nemotron Omni with a Nemotron-H text model, whose attention and experts are layers of their own."""

from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import grouped_sigmoid_gate

NEMOTRON_H_OMNI = Family(
    title="Nemotron-Omni",
    parent_type="nemotron_h_omni",
    text_type="nemotron_h",
    placeholders=("image_token_id", "video_token_id"),
    videos=True,
    norm="norm",
    moe="mixer",
    routing_options=grouped_sigmoid_gate,
    gate_class="NemotronHTopkRouter",
    expert_options=None,
    prunable_kinds=(),
    prune_obstacle=lambda *_: "no layer holds both attention and experts",
    preset=Preset(
        supported="Nemotron-Omni (the name nemotron-3-nano-omni-30b-a3b)",
        names=r"nemotron-3-nano-omni-30b-a3b(-.*)?",
        num_experts_per_tok=6,
        prune_layers=(),
    ),
    checkpoint="nvidia/Nemotron-3-Nano-Omni-30B-A3B",
)
