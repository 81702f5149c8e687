"""Kimi-K2.5 and K2.6 on a DeepSeek-V3 text model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import grouped_sigmoid_gate
from fastmmoe.families.tiling import Tiling, grid_tilings


def _tilings(config: Any, processor: Any, images: Sequence[Any], inputs: Mapping[str, Any]) -> list[Tiling]:
    """A grid; the processor puts borders on the right and at the bottom."""
    from transformers.models.kimi_k25.image_processing_kimi_k25 import navit_resize

    settings = processor.image_processor
    made = []
    for image, tiling in zip(images, grid_tilings(config, processor, images, inputs), strict=True):
        (height, width), (whole_height, whole_width) = navit_resize(
            image.height,
            image.width,
            patch_size=settings.patch_size,
            merge_kernel_size=settings.merge_size,
            max_patches=settings.max_patches,
            max_size_per_side=settings.size["max_height"],
        )
        made.append(replace(tiling, covered=(0.0, 0.0, width / whole_width, height / whole_height)))
    return made


KIMI_K25 = Family(
    title="Kimi-K2.5",
    parent_type="kimi_k25",
    text_type="deepseek_v3",
    placeholders=("image_token_id", "video_token_id"),
    videos=True,
    routing_options=grouped_sigmoid_gate,
    gate_class="DeepseekV3TopkRouter",
    preset=Preset(
        supported="Kimi-K2.5 (the names kimi-k2.5, kimi-k2.6)",
        names=r"kimi-k2\.[56](-.*)?",
        num_experts_per_tok=8,
        prune_layers=(6, 10, 15),
    ),
    architectures=dict.fromkeys(
        ("kimi-k2.5", "kimi-k2.6"),
        Architecture.of(
            num_hidden_layers=61,
            hidden_size=7168,
            num_attention_heads=64,
            kv_lora_rank=512,
            q_lora_rank=1536,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            v_head_dim=128,
            n_routed_experts=384,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            intermediate_size=18432,
            n_shared_experts=1,
            first_k_dense_replace=1,
        ),
    ),
    checkpoint="moonshotai/Kimi-K2.5",
    tilings=_tilings,
)
