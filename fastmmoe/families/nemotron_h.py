"""Nemotron Omni with a Nemotron-H text model, whose attention and experts are layers of their own."""

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import grouped_sigmoid_gate

# M is a block of Mamba, E of experts, * of attention
_BLOCKS = {"M": "linear_attention", "E": "moe", "*": "full_attention"}
_NANO = [_BLOCKS[block] for block in "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"]


NEMOTRON_H_OMNI = Family(
    title="Nemotron-Omni",
    parent_type="nemotron_h_omni",
    text_type="nemotron_h",
    norms_heads=False,
    placeholders=("image_token_id", "video_token_id"),
    videos=True,
    norm="norm",
    moe="mixer",
    routing_options=grouped_sigmoid_gate,
    gate_class="NemotronHTopkRouter",
    prunable_kinds=(),
    prune_obstacle=lambda *_: "no layer holds both attention and experts",
    preset=Preset(
        supported="Nemotron-Omni (the name nemotron-3-nano-omni-30b-a3b)",
        names=r"nemotron-3-nano-omni-30b-a3b(-.*)?",
        num_experts_per_tok=6,
        prune_layers=(),
    ),
    architectures={
        "nemotron-3-nano-omni-30b-a3b": Architecture.of(
            norms_heads=False,
            num_hidden_layers=len(_NANO),
            hidden_size=2688,
            layer_types=_NANO,
            layers_block_type=_NANO,
            num_attention_heads=32,
            num_key_value_heads=2,
            head_dim=128,
            mamba_num_heads=64,
            mamba_head_dim=64,
            ssm_state_size=128,
            n_groups=8,
            conv_kernel=4,
            mlp_hidden_act="relu2",
            n_routed_experts=128,
            num_experts_per_tok=6,
            moe_intermediate_size=1856,
            moe_shared_expert_intermediate_size=3712,
        )
    },
    checkpoint="nvidia/Nemotron-3-Nano-Omni-30B-A3B",
)
