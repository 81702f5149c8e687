"""MiniMax-M3: full and block-sparse attention."""

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import sigmoid_gate
from fastmmoe.families.tiling import grid_tilings

MINIMAX_M3_VL = Family(
    title="MiniMax-M3",
    parent_type="minimax_m3_vl",
    text_type="minimax_m3_vl_text",
    placeholders=("image_token_index", "video_token_index"),
    videos=True,
    routing_options=sigmoid_gate,
    gate_class="MiniMaxM3VLTopKRouter",
    prunable_kinds=("full_attention", "minimax_m3_sparse"),
    # the indexer's blocks are places in the cache
    positions="slot",
    preset=Preset(
        supported="MiniMax-M3 (the name minimax-m3)",
        names=r"minimax-m3(-.*)?",
        num_experts_per_tok=4,
        prune_layers=(6, 10, 15),
    ),
    architectures={
        "minimax-m3": Architecture.of(
            num_hidden_layers=60,
            hidden_size=6144,
            num_attention_heads=64,
            num_key_value_heads=4,
            head_dim=128,
            num_local_experts=128,
            num_experts_per_tok=4,
            intermediate_size=3072,
            shared_intermediate_size=3072,
        )
    },
    checkpoint="MiniMaxAI/MiniMax-M3",
    tilings=grid_tilings,
)
