"""GLM-4.5V and GLM-4.6V."""

from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import grouped_sigmoid_gate
from fastmmoe.families.tiling import grid_tilings

GLM4V_MOE = Family(
    title="GLM-4.5V",
    parent_type="glm4v_moe",
    text_type="glm4v_moe_text",
    # of video frames too
    placeholders=("image_token_id",),
    videos=True,
    routing_options=grouped_sigmoid_gate,
    gate_class="Glm4vMoeTextTopkRouter",
    preset=Preset(
        supported="GLM-4.5V (the names glm-4.5v, glm-4.6v)",
        names=r"glm-4\.[56]v(-(?!flash).*)?",
        num_experts_per_tok=8,
        prune_layers=(5, 8, 12),
    ),
    checkpoint="zai-org/GLM-4.5V",
    tilings=grid_tilings,
)
