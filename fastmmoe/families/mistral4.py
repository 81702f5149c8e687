"""Mistral Small 4: Mistral3 with a Mistral4 text model, which scales queries by position."""

from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import grouped_softmax_gate
from fastmmoe.families.tiling import pixel_tilings

MISTRAL3_MISTRAL4 = Family(
    title="Mistral-Small-4",
    parent_type="mistral3",
    text_type="mistral4",
    placeholders=("image_token_index",),
    features=("pixel_values", "mm_encoder_outputs"),
    routing_options=grouped_softmax_gate,
    gate_class="Mistral4TopkRouter",
    positions="source",
    preset=Preset(
        supported="Mistral-Small-4 (the name mistral-small-4-119b)",
        names=r"mistral-small-4-119b(-.*)?",
        num_experts_per_tok=4,
        prune_layers=(4, 6, 9),
    ),
    checkpoint="mistralai/Mistral-Small-4-119B-2603",
    tilings=pixel_tilings,
)
