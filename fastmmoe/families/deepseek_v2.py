"""DeepSeek-VL2 (`fastmmoe.models.deepseek_vl2`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.tiling import Tiling, fitted, grid

DEEPSEEK_VL2_TINY = Architecture.of(
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

_DEEPSEEK_VL2_SMALL = Architecture.of(
    norms_heads=False,
    num_hidden_layers=27,
    hidden_size=2048,
    num_attention_heads=16,
    num_key_value_heads=16,
    qk_nope_head_dim=128,
    n_routed_experts=64,
    num_experts_per_tok=6,
    moe_intermediate_size=1408,
    intermediate_size=10944,
    n_shared_experts=2,
    first_k_dense_replace=1,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    v_head_dim=128,
)

_DEEPSEEK_VL2 = Architecture.of(
    norms_heads=False,
    num_hidden_layers=30,
    hidden_size=2560,
    num_attention_heads=32,
    num_key_value_heads=32,
    qk_nope_head_dim=128,
    n_routed_experts=72,
    num_experts_per_tok=6,
    moe_intermediate_size=1536,
    intermediate_size=12288,
    n_shared_experts=2,
    first_k_dense_replace=1,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    v_head_dim=128,
)


def _vision_mask(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor | None:
    """`images_seq_mask`, by which the model itself goes; row ends and the view separator are vision tokens too."""
    images, mask, crop = (inputs.get(name) for name in ("images", "images_seq_mask", "images_spatial_crop"))
    if images is None or mask is None or crop is None:
        return None
    # where no sample begins with a crop, the model takes the batch for text
    return mask.bool() & crop[:, :1].all(-1).any().to(mask.device)


def load_deepseek_processor(checkpoint: str) -> Any:
    """The port's own processor."""
    from fastmmoe.models.deepseek_vl2 import DeepseekVLV2Processor

    return DeepseekVLV2Processor.from_pretrained(checkpoint)


def _tilings(config: Any, processor: Any, images: Sequence[Any], inputs: Mapping[str, Any]) -> list[Tiling]:
    """A global view and local tiles, with borders around the picture; tokens end each row and the first view."""
    from fastmmoe.models.deepseek_vl2.image_tokens import tokens_per_side

    settings, made = processor.image_processor, []
    for image, (wide, high) in zip(images, inputs["images_spatial_crop"][0].tolist(), strict=True):
        side = tokens_per_side(settings.tile_size, settings.patch_size, settings.downsample_ratio)
        view, local = (side, side), (high * side, wide * side)
        n_view, n_local = (rows * (columns + 1) for rows, columns in (view, local))
        first_view, first_local = (0, n_view + 1) if config.global_view_pos == "head" else (n_local + 1, 0)
        made.append(
            Tiling(
                grid(*local, first_local, row_ends=1),
                grid(*view, first_view, row_ends=1),
                n_view + 1 + n_local,
                (high, wide),
                covered=fitted(image.size, (wide, high)),
                thumbnail_covered=fitted(image.size, (1, 1)),
            )
        )
    return made


DEEPSEEK_VL2 = Family(
    title="DeepSeek-VL2",
    parent_type="deepseek_vl_v2",
    text_type="deepseek_v2",
    norms_heads=False,
    features=("images",),
    vision_mask=_vision_mask,
    routing_options=lambda gate: {
        "top_k": gate.top_k,
        "scoring": gate.scoring_func,
        "norm_topk_prob": gate.norm_topk_prob,
        "correction_bias": gate.e_score_correction_bias,
        "n_group": gate.n_group,
        "topk_group": gate.topk_group,
        "routed_scaling_factor": float(gate.routed_scaling_factor),
    },
    gate_class="DeepseekVLV2Router",
    preset=Preset(
        supported="DeepSeek-VL2 (a model or config of type deepseek_vl_v2; the names deepseek-vl2, "
        "deepseek-vl2-small, deepseek-vl2-tiny)",
        names=r"deepseek-vl2(-small|-tiny)?",
        num_experts_per_tok=6,
        prune_layers=(2, 5, 8),
        alpha=0.3,
        merge_ratio=0.05,
        official=True,
    ),
    # hub names that start with one are found too, so a name stands in front of its own start
    architectures={
        "deepseek-vl2-tiny": DEEPSEEK_VL2_TINY,
        "deepseek-vl2-small": _DEEPSEEK_VL2_SMALL,
        "deepseek-vl2": _DEEPSEEK_VL2,
    },
    checkpoint="deepseek-ai/deepseek-vl2-small",
    load_processor=load_deepseek_processor,
    tilings=_tilings,
    port="fastmmoe.models.deepseek_vl2",
)
