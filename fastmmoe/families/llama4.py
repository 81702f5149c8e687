"""Llama 4, whose tokens take one expert each."""

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset

_SIZES = dict(
    num_hidden_layers=48,
    hidden_size=5120,
    layer_types=["full_attention" if i % 4 == 3 else "chunked_attention" for i in range(48)],
    no_rope_layers=[int(i % 4 != 3) for i in range(48)],
    attention_chunk_size=8192,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    num_experts_per_tok=1,
    intermediate_size=8192,
    intermediate_size_mlp=16384,
)


LLAMA4 = Family(
    title="Llama-4",
    parent_type="llama4",
    text_type="llama4_text",
    placeholders=("image_token_index",),
    features=("pixel_values", "mm_encoder_outputs"),
    moe="feed_forward",
    gate="router",
    routing_options=lambda gate: {"top_k": gate.top_k, "scoring": "sigmoid", "norm_topk_prob": False},
    gate_class="Llama4Router",
    linear=None,
    logits=lambda output: output[1],
    expert_obstacle=lambda config: (
        "every token takes one expert already"
        if getattr(config, "num_experts_per_tok", 1) == 1
        else "its experts run on every token, whatever the router says"
    ),
    preset=Preset(
        supported="Llama-4 (the names llama-4-scout-17b-16e, llama-4-maverick-17b-128e)",
        names=r"llama-4-(scout-17b-16e|maverick-17b-128e)(-.*)?",
        num_experts_per_tok=1,
        prune_layers=(7, 11, 15),
    ),
    architectures={
        "llama-4-scout-17b-16e": Architecture.of(**_SIZES, num_local_experts=16),
        "llama-4-maverick-17b-128e": Architecture.of(**_SIZES, num_local_experts=128, interleave_moe_layer_step=2),
    },
    checkpoint="meta-llama/Llama-4-Scout-17B-16E-Instruct",
)
