"""Mistral Large 4, whose layers share the choice of an indexer."""

from typing import Any

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import grouped_softmax_gate
from fastmmoe.families.tiling import pixel_tilings


def _shares_slots(text_config: Any, layer: int) -> str:
    """Later layers may look at places in the cache, or at keys, that this layer or an earlier one left for them."""
    if text_config is None:
        return ""
    if text_config.indexer_types[layer + 1 : layer + 2] == ["shared"]:
        return "the next layer reuses the keys that an indexer chose for this one"
    if any(source <= layer for source in text_config.kv_source_layers[layer + 1 :]):
        return "later layers reuse the keys and values of the tokens in front of it"
    return ""


MISTRAL_LARGE4 = Family(
    title="Mistral-Large-4",
    parent_type="mistral_large4",
    text_type="mistral_large4_text",
    placeholders=("image_token_index",),
    features=("pixel_values", "mm_encoder_outputs"),
    routing_options=grouped_softmax_gate,
    gate_class="MistralLarge4TextTopkRouter",
    positions="source",
    prunable_kinds=("indexed_attention",),
    prune_obstacle=_shares_slots,
    preset=Preset(
        supported="Mistral-Large-4 (the name mistral-large-4)",
        names=r"mistral-large-4(-.*)?",
        num_experts_per_tok=4,
        prune_layers=(8, 12, 18),
    ),
    architectures={
        "mistral-large-4-1t-a52b": Architecture.of(
            num_hidden_layers=72,
            hidden_size=6144,
            layer_types=["indexed_attention"] * 72,
            num_attention_heads=64,
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            qk_nope_head_dim=64,
            v_head_dim=128,
            no_rope_layers=[1, 1, 1, 0] * 18,
            index_topk=2048,
            index_head_dim=128,
            index_n_heads=32,
            n_routed_experts=128,
            num_experts_per_tok=4,
            moe_intermediate_size=6144,
            intermediate_size=24576,
            n_shared_experts=1,
            first_k_dense_replace=1,
        )
    },
    checkpoint="mistralai/Mistral-Large-4-1T-A52B",
    tilings=pixel_tilings,
)
