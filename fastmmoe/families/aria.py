"""Aria."""

from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import softmax_gate

ARIA = Family(
    title="Aria",
    parent_type="aria",
    text_type="aria_text",
    placeholders=("image_token_index",),
    features=("pixel_values", "mm_encoder_outputs"),
    gate="router",
    routing_options=softmax_gate,
    gate_class="AriaTextTopKRouter",
    expert_options=None,
    top_k="moe_topk",
    preset=Preset(
        supported="Aria (the name aria)",
        names=r"aria(-.*)?",
        num_experts_per_tok=6,
        prune_layers=(3, 5, 7),
    ),
    checkpoint="rhymes-ai/Aria",
)
