"""DeepSeek-OCR-2."""

from fastmmoe.families.deepseek_v2 import DEEPSEEK_VL2_TINY
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import unnormalised_softmax_gate

DEEPSEEK_OCR2 = Family(
    title="DeepSeek-OCR-2",
    parent_type="deepseek_ocr2",
    text_type="deepseek_ocr2_text",
    norms_heads=False,
    placeholders=("image_token_id",),
    features=("pixel_values", "pixel_values_local", "mm_encoder_outputs"),
    routing_options=unnormalised_softmax_gate,
    gate_class="DeepseekOcr2TextTopkRouter",
    preset=Preset(
        supported="DeepSeek-OCR-2 (the name deepseek-ocr-2)",
        names=r"deepseek-ocr-2(-.*)?",
        num_experts_per_tok=6,
        prune_layers=(1, 2, 3),
    ),
    architectures={"deepseek-ocr-2": DEEPSEEK_VL2_TINY},
    checkpoint="deepseek-ai/DeepSeek-OCR-2",
)
