"""Inkling 2, whose residuals are attention over blocks of layers."""

from typing import Any

from fastmmoe.families.architecture import Architecture, gate_weights, head_gate_weights
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import sigmoid_gate


def _mixer_weights(config: Any, layer: int) -> int:
    """A gate and sinks of attention, relative positions, and convolutions behind keys, values, attention and MLP."""
    is_sliding = config.layer_types[layer] == "hybrid_sliding"
    of = "swa_" if is_sliding else ""
    heads, key_heads = (getattr(config, f"{of}num_{name}_heads") for name in ("attention", "key_value"))
    extent = config.sliding_window_size if is_sliding else config.rel_extent
    kernel, key_width = config.conv_kernel_size, key_heads * getattr(config, f"{of}head_dim")
    relative = heads * config.d_rel * (config.hidden_size + extent)
    # full layers make the kernel of each head token by token
    convolved = key_width + (0 if is_sliding else config.hidden_size * key_heads)
    convolutions = 2 * kernel * (convolved + config.hidden_size)
    return gate_weights(config, layer) + head_gate_weights(config, layer) + relative + convolutions


INKLING2 = Family(
    title="Inkling-2",
    parent_type="inkling2",
    text_type="inkling2_text",
    norms_heads=False,
    placeholders=("image_token_id",),
    features=("pixel_values", "mm_encoder_outputs"),
    mixer_weights=_mixer_weights,
    routing_options=sigmoid_gate,
    gate_class="Inkling2TopKRouter",
    own_experts=True,
    prunable_kinds=(),
    prune_obstacle=lambda *_: (
        "its residuals are made of the states of earlier blocks of layers, and all of them would have to be shortened"
    ),
    preset=Preset(
        supported="Inkling-2 (the name inkling-2-small)",
        names=r"inkling-2(-.*)?",
        num_experts_per_tok=8,
        prune_layers=(),
    ),
    architectures={
        "inkling-2-small": Architecture.of(
            norms_heads=False,
            mixer_weights=_mixer_weights,
            num_hidden_layers=48,
            hidden_size=4608,
            layer_types=["hybrid" if i % 6 == 5 else "hybrid_sliding" for i in range(48)],
            sliding_window_size=1024,
            num_attention_heads=48,
            num_key_value_heads=8,
            head_dim=128,
            swa_num_attention_heads=48,
            swa_num_key_value_heads=8,
            swa_head_dim=128,
            d_rel=16,
            rel_extent=1024,
            conv_kernel_size=4,
            n_routed_experts=384,
            num_experts_per_tok=8,
            moe_intermediate_size=2304,
        )
    },
    checkpoint="thinkingmachines/Inkling-2-Small",
)
