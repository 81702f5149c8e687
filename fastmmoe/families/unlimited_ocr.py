"""Unlimited-OCR, whose decoded tokens see the whole prompt and a window of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import unnormalised_softmax_gate
from fastmmoe.families.tiling import WHOLE, Tiling, fitted, grid


def _mask(*, layer_idx: int, **options: Any) -> torch.Tensor | None:
    """The mask of one layer; transformers takes the length of the prompt from the first one, which sees all of it."""
    from transformers.models.unlimited_ocr.modeling_unlimited_ocr import create_reference_sliding_window_causal_mask

    (name,) = options.keys() & {"cache", "past_key_values"}
    # some caches make a layer when it is first written to
    layers = [] if options[name] is None else options[name].layers[layer_idx : layer_idx + 1]
    options[name] = Cache(layers=layers) if layers else None
    return create_reference_sliding_window_causal_mask(layer_idx=0, **options)


def _tilings(config: Any, processor: Any, images: Sequence[Any], inputs: Mapping[str, Any]) -> list[Tiling]:
    """Local tiles of a large image, then a global view; a token ends each row, and one the image."""
    settings, made = processor.image_processor, []
    sizes = max(settings.size["height"], settings.size["width"]), settings.tile_size
    side, local_side = (-(-(pixels // processor.patch_size) // processor.downsample_ratio) for pixels in sizes)
    # smaller ones than this are stretched to a square, without borders
    is_stretched = not settings.crop_to_patches and sizes[0] <= settings.maximum_pad_value
    crops = zip(images, inputs["patches_grid"], inputs["num_local_patches"], strict=True)
    for image, (columns, rows), n_tiles in crops:
        covered = WHOLE if is_stretched else fitted(image.size, (1, 1))
        n_view = side * (side + 1)
        if not n_tiles:
            made.append(Tiling(grid(side, side, row_ends=1), None, n_view + 1, covered=covered))
            continue
        local = grid(rows * local_side, columns * local_side, row_ends=1)
        n_local = len(local) * (local.shape[1] + 1)
        view = grid(side, side, n_local, row_ends=1)
        made.append(Tiling(local, view, n_local + n_view + 1, (rows, columns), thumbnail_covered=covered))
    return made


def _shorten_cache(layer: Any, removed: int) -> None:
    """What it expects of the prompt is never evicted, and decoded tokens must not take the place of pruned ones."""
    expected = getattr(layer, "prefill_length", None)
    if expected is not None and layer.prefill_cumulative_length < expected:
        layer.prefill_length -= removed


UNLIMITED_OCR = Family(
    title="Unlimited-OCR",
    parent_type="unlimited_ocr",
    text_type="unlimited_ocr_text",
    norms_heads=False,
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
            norms_heads=False,
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
    tilings=_tilings,
)
