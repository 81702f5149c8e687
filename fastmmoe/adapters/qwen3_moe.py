"""InternVL (3.5) with a Qwen3-MoE text model."""

from fastmmoe.adapters.adapter import Adapter

INTERNVL_QWEN3_MOE = Adapter(
    parent_type="internvl",
    text_type="qwen3_moe",
    vision_token_ids=lambda config: (config.image_token_id,),
    vision_inputs=("pixel_values", "mm_encoder_outputs"),
    scoring="softmax",
    routing_options=lambda gate: {"top_k": gate.top_k, "norm_topk_prob": gate.norm_topk_prob},
)
