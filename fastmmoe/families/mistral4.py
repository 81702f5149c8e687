"""Mistral Small 4: Mistral3 with a Mistral4 text model, which scales queries by position."""

from fastmmoe.families.architecture import Architecture
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
    architectures={
        "mistral-small-4-119b": Architecture.of(
            num_hidden_layers=36,
            hidden_size=4096,
            num_attention_heads=32,
            kv_lora_rank=256,
            q_lora_rank=1024,
            qk_rope_head_dim=64,
            qk_nope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=128,
            num_experts_per_tok=4,
            moe_intermediate_size=2048,
            n_shared_experts=1,
        )
    },
    checkpoint="mistralai/Mistral-Small-4-119B-2603",
    tilings=pixel_tilings,
)
