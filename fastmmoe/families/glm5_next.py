"""GLM-5.3-Flash, whose layers mix several residual streams."""

from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import grouped_sigmoid_gate

GLM5_NEXT = Family(
    title="GLM-5-Next",
    parent_type="glm5_next",
    text_type="glm5_next_text",
    placeholders=("image_token_id", "video_token_id"),
    videos=True,
    routing_options=grouped_sigmoid_gate,
    gate_class="Glm5NextTextTopkRouter",
    expert_options=None,
    prunable_kinds=(),
    prune_obstacle=lambda *_: "its layers mix several residual streams, and all of them would have to be shortened",
    preset=Preset(
        supported="GLM-5-Next (the name glm-5.3-flash)",
        names=r"glm-5\.3-flash(-.*)?",
        num_experts_per_tok=8,
        prune_layers=(),
    ),
    checkpoint="zai-org/GLM-5.3-Flash",
)
