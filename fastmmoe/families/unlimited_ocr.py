"""Unlimited-OCR, whose decoded tokens see the whole prompt and a window of their own."""

from typing import Any

import torch
from transformers.cache_utils import Cache

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import unnormalised_softmax_gate


def _mask(*, past_key_values: Cache | None, layer_idx: int, **options: Any) -> torch.Tensor | None:
    """The mask of one layer; transformers takes the length of the prompt from the first one, which sees all of it."""
    from transformers.models.unlimited_ocr.modeling_unlimited_ocr import create_reference_sliding_window_causal_mask

    # some caches make a layer when it is first written to
    layers = [] if past_key_values is None else past_key_values.layers[layer_idx : layer_idx + 1]
    alone = Cache(layers=layers) if layers else None
    return create_reference_sliding_window_causal_mask(past_key_values=alone, layer_idx=0, **options)


def _shorten_cache(layer: Any, removed: int) -> None:
    """What it expects of the prompt is never evicted, and decoded tokens must not take the place of pruned ones."""
    expected = getattr(layer, "prefill_length", None)
    if expected is not None and layer.prefill_cumulative_length < expected:
        layer.prefill_length -= removed


UNLIMITED_OCR = Family(
    title="Unlimited-OCR",
    parent_type="unlimited_ocr",
    text_type="unlimited_ocr_text",
    placeholders=("image_token_id",),
    features=("pixel_values", "pixel_values_local", "mm_encoder_outputs"),
    routing_options=unnormalised_softmax_gate,
    gate_class="UnlimitedOcrTextTopkRouter",
    prunable_kinds=("reference_sliding_attention",),
    shorten_cache=_shorten_cache,
    masks={"reference_sliding_attention": _mask},
    preset=Preset(
        supported="Unlimited-OCR (the name unlimited-ocr)",
        names=r"unlimited-ocr(-.*)?",
        num_experts_per_tok=6,
        prune_layers=(1, 2, 3),
    ),
    architectures={
        "unlimited-ocr": Architecture.of(
            num_hidden_layers=12,
            hidden_size=1280,
            num_attention_heads=10,
            num_key_value_heads=10,
            head_dim=128,
            n_routed_experts=64,
            num_experts_per_tok=6,
            moe_intermediate_size=896,
            intermediate_size=6848,
            n_shared_experts=2,
            first_k_dense_replace=1,
        )
    },
    checkpoint="baidu/Unlimited-OCR",
)
