"""GLM-5.3-Flash, whose layers mix several residual streams."""

from typing import Any

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import grouped_sigmoid_gate


def _stream_weights(config: Any, layer: int) -> int:
    """In front of attention and of the MLP, what computes how the residual streams mix, and mixes them."""
    streams = config.hc_mult
    return 2 * ((2 + streams) * streams * streams + streams**2) * config.hidden_size


GLM5_NEXT = Family(
    title="GLM-5-Next",
    parent_type="glm5_next",
    text_type="glm5_next_text",
    placeholders=("image_token_id", "video_token_id"),
    videos=True,
    mixer_weights=_stream_weights,
    routing_options=grouped_sigmoid_gate,
    gate_class="Glm5NextTextTopkRouter",
    prunable_kinds=(),
    prune_obstacle=lambda *_: "its layers mix several residual streams, and all of them would have to be shortened",
    preset=Preset(
        supported="GLM-5-Next (the name glm-5.3-flash)",
        names=r"glm-5\.3-flash(-.*)?",
        num_experts_per_tok=8,
        prune_layers=(),
    ),
    architectures={
        "glm-5.3-flash": Architecture.of(
            mixer_weights=_stream_weights,
            num_hidden_layers=45,
            hidden_size=4096,
            hc_mult=4,
            layer_types=["indexed_attention" if i % 4 == 3 else "linear_attention" for i in range(45)],
            num_attention_heads=64,
            kv_lora_rank=512,
            q_lora_rank=1536,
            qk_rope_head_dim=0,
            qk_nope_head_dim=256,
            v_head_dim=256,
            index_topk=2048,
            index_head_dim=128,
            index_n_heads=32,
            index_kpool=16,
            linear_head_dim=128,
            linear_num_heads=64,
            linear_conv_kernel_dim=4,
            n_routed_experts=288,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            intermediate_size=12288,
            n_shared_experts=1,
            first_k_dense_replace=3,
        )
    },
    checkpoint="zai-org/GLM-5.3-Flash",
)
