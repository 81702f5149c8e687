"""InternVL (3.5) with a Qwen3-MoE text model."""

from fastmmoe.adapters.adapter import Adapter, placeholder_mask

INTERNVL_QWEN3_MOE = Adapter(
    parent_type="internvl",
    text_type="qwen3_moe",
    vision_mask=placeholder_mask(lambda config: (config.image_token_id,), ("pixel_values", "mm_encoder_outputs")),
    routing_options=lambda gate: {
        "top_k": gate.top_k,
        "scoring": "softmax",
        "norm_topk_prob": gate.norm_topk_prob,
    },
)
