"""Aria."""

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import softmax_gate

ARIA = Family(
    title="Aria",
    parent_type="aria",
    text_type="aria_text",
    norms_heads=False,
    placeholders=("image_token_index",),
    features=("pixel_values", "mm_encoder_outputs"),
    gate="router",
    routing_options=softmax_gate,
    gate_class="AriaTextTopKRouter",
    top_k="moe_topk",
    preset=Preset(
        supported="Aria (the name aria)",
        names=r"aria(-.*)?",
        num_experts_per_tok=6,
        prune_layers=(3, 5, 7),
    ),
    architectures={
        "aria": Architecture.of(
            norms_heads=False,
            num_hidden_layers=28,
            hidden_size=2560,
            num_attention_heads=20,
            num_key_value_heads=20,
            head_dim=128,
            moe_num_experts=64,
            moe_topk=6,
            intermediate_size=1664,
            moe_num_shared_experts=2,
        )
    },
    checkpoint="rhymes-ai/Aria",
)
