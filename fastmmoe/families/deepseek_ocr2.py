"""DeepSeek-OCR-2."""

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import unnormalised_softmax_gate

DEEPSEEK_OCR2 = Family(
    title="DeepSeek-OCR-2",
    parent_type="deepseek_ocr2",
    text_type="deepseek_ocr2_text",
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
    architectures={
        "deepseek-ocr-2": Architecture.of(
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
    checkpoint="deepseek-ai/DeepSeek-OCR-2",
)
