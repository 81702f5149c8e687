"""InternVL (3.5) with a Qwen3-MoE text model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.tiling import Tiling, tiled

if TYPE_CHECKING:
    from PIL.Image import Image

QWEN3_30B_A3B = Architecture.of(
    num_hidden_layers=48,
    hidden_size=2048,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
)

QWEN3_235B_A22B = Architecture.of(
    num_hidden_layers=94,
    hidden_size=4096,
    num_attention_heads=64,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=1536,
)


def load_internvl_processor(checkpoint: str) -> Any:
    """The processor without its video part, the only one that needs torchvision."""
    from fastmmoe.families.internvl_processor import InternVLProcessor

    return InternVLProcessor.from_pretrained(checkpoint, trust_remote_code=False)


def internvl_tilings(config: Any, processor: Any, images: Sequence[Image], inputs: Mapping[str, Any]) -> list[Tiling]:
    """How an InternVL processor, called with its own settings, cuts each of the images."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    settings = processor.image_processor
    tile, side = (settings.size["height"], settings.size["width"]), round(processor.image_seq_length**0.5)
    made = []
    for image in images:
        columns, rows = get_optimal_tiled_canvas(
            (image.height, image.width), tile, settings.min_patches, settings.max_patches
        )
        made.append(tiled(rows, columns, side))
    return made


INTERNVL_QWEN3_MOE = Family(
    title="InternVL",
    parent_type="internvl",
    text_type="qwen3_moe",
    placeholders=("image_token_id",),
    features=("pixel_values", "mm_encoder_outputs"),
    routing_options=lambda gate: {
        "top_k": gate.top_k,
        "scoring": "softmax",
        "norm_topk_prob": gate.norm_topk_prob,
    },
    gate_class="Qwen3MoeTopKRouter",
    preset=Preset(
        supported="InternVL3.5 (a model or config of type internvl or qwen3_moe; names such as internvl3.5, "
        "internvl3.5-30b-a3b, internvl3.5-241b-a28b)",
        # the family's other sizes are dense or have another K
        names=r"internvl3\.5(-(30b-a3b|241b-a28b)(-.*)?)?",
        num_experts_per_tok=8,
        prune_layers=(5, 8, 12),
        alpha=0.5,
        merge_ratio=0.025,
        official=True,
    ),
    architectures={"internvl3.5-30b-a3b": QWEN3_30B_A3B, "internvl3.5-241b-a28b": QWEN3_235B_A22B},
    checkpoint="OpenGVLab/InternVL3_5-30B-A3B-HF",
    load_processor=load_internvl_processor,
    tilings=internvl_tilings,
    random_model="fastmmoe.families.internvl_random",
)
