"""Unlimited-OCR, whose decoded tokens see the whole prompt and a window of their own."""

from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import unnormalised_softmax_gate

UNLIMITED_OCR = Family(
    title="Unlimited-OCR",
    parent_type="unlimited_ocr",
    text_type="unlimited_ocr_text",
    placeholders=("image_token_id",),
    features=("pixel_values", "pixel_values_local", "mm_encoder_outputs"),
    routing_options=unnormalised_softmax_gate,
    gate_class="UnlimitedOcrTextTopkRouter",
    prunable_kinds=("reference_sliding_attention",),
    preset=Preset(
        supported="Unlimited-OCR (the name unlimited-ocr)",
        names=r"unlimited-ocr(-.*)?",
        num_experts_per_tok=6,
        prune_layers=(1, 2, 3),
    ),
    checkpoint="baidu/Unlimited-OCR",
)
