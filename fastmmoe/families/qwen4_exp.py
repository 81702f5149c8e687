"""Qwen4-Exp, whose layers mix several residual streams."""

from typing import Any

from fastmmoe.families.architecture import Architecture, gate_weights
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import softmax_gate


def _mixer_weights(config: Any, layer: int) -> int:
    """A gate of attention and, in front of it and of the MLP, what mixes the residual streams."""
    width = config.hc_count * config.hidden_size
    return gate_weights(config, layer) + 2 * width * (2 * config.hc_lowrank + config.hc_count)


QWEN4_EXP = Family(
    title="Qwen4-Exp",
    parent_type="qwen4_exp",
    text_type="qwen4_exp_text",
    placeholders=("image_token_id", "video_token_id"),
    videos=True,
    mixer_weights=_mixer_weights,
    routing_options=softmax_gate,
    gate_class="Qwen4ExpTextTopKRouter",
    prunable_kinds=(),
    prune_obstacle=lambda *_: (
        "its layers mix several residual streams and n-grams of neighbouring tokens, and "
        "all of them would have to be shortened"
    ),
    preset=Preset(
        supported="Qwen4-Exp (the name qwen4-exp)",
        names=r"qwen4-exp(-.*)?",
        num_experts_per_tok=10,
        prune_layers=(),
    ),
    architectures={
        # its indexer's sizes are not known, and left out
        "qwen4-exp": Architecture.of(
            mixer_weights=_mixer_weights,
            num_hidden_layers=40,
            hidden_size=2048,
            layer_types=["indexed_attention" if i % 4 == 3 else "linear_attention" for i in range(40)],
            num_attention_heads=16,
            num_key_value_heads=2,
            head_dim=256,
            linear_conv_kernel_dim=4,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            linear_num_key_heads=16,
            linear_num_value_heads=32,
            hc_count=4,
            hc_lowrank=320,
            num_experts=512,
            num_experts_per_tok=10,
            moe_intermediate_size=512,
            shared_expert_intermediate_size=512,
        )
    },
    checkpoint="Qwen/Qwen4-Exp",
)
