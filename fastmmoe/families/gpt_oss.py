"""InternVL (3.5) with a gpt-oss text model: sliding and full attention in turn, of which the latter may prune."""

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import softmax_gate

INTERNVL_GPT_OSS = Family(
    title="InternVL with gpt-oss",
    parent_type="internvl",
    text_type="gpt_oss",
    norms_heads=False,
    placeholders=("image_token_id",),
    features=("pixel_values", "mm_encoder_outputs"),
    gate="router",
    routing_options=softmax_gate,
    gate_class="GptOssTopKRouter",
    linear=lambda gate: {"bias": gate.bias},
    rows_by=(),
    preset=Preset(
        supported="InternVL3.5 with gpt-oss (the name internvl3.5-gpt-oss-20b-a4b-preview)",
        names=r"internvl3\.5-gpt-oss-20b-a4b(-.*)?",
        num_experts_per_tok=4,
        prune_layers=(3, 5, 7),
    ),
    architectures={
        "internvl3.5-gpt-oss-20b-a4b": Architecture.of(
            norms_heads=False,
            num_hidden_layers=24,
            hidden_size=2880,
            layer_types=["sliding_attention", "full_attention"] * 12,
            sliding_window=128,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=64,
            num_local_experts=32,
            num_experts_per_tok=4,
            intermediate_size=2880,
        )
    },
    checkpoint="OpenGVLab/InternVL3_5-GPT-OSS-20B-A4B-Preview-HF",
)
