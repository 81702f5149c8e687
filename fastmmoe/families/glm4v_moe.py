"""GLM-4.5V and GLM-4.6V."""

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import grouped_sigmoid_gate
from fastmmoe.families.tiling import grid_tilings

GLM4V_MOE = Family(
    title="GLM-4.5V",
    parent_type="glm4v_moe",
    text_type="glm4v_moe_text",
    norms_heads=False,
    # of video frames too
    placeholders=("image_token_id",),
    videos=True,
    routing_options=grouped_sigmoid_gate,
    gate_class="Glm4vMoeTextTopkRouter",
    rows_by=(3,),
    preset=Preset(
        supported="GLM-4.5V (the names glm-4.5v, glm-4.6v)",
        names=r"glm-4\.[56]v(-(?!flash).*)?",
        num_experts_per_tok=8,
        prune_layers=(5, 8, 12),
    ),
    # GLM-4.6V is of the same sizes
    architectures=dict.fromkeys(
        ("glm-4.5v", "glm-4.6v"),
        Architecture.of(
            norms_heads=False,
            num_hidden_layers=46,
            hidden_size=4096,
            num_attention_heads=96,
            num_key_value_heads=8,
            partial_rotary_factor=0.5,
            head_dim=128,
            n_routed_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=1408,
            intermediate_size=10944,
            n_shared_experts=1,
            first_k_dense_replace=1,
        ),
    ),
    checkpoint="zai-org/GLM-4.5V",
    tilings=grid_tilings,
)
