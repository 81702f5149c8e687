"""Step-3.7-Flash: full and sliding attention, of which the former may prune."""

from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import sigmoid_gate

STEP3P7 = Family(
    title="Step-3.7",
    parent_type="step3p7",
    text_type="step3p5",
    placeholders=("image_token_id",),
    features=("pixel_values", "pixel_values_local", "mm_encoder_outputs"),
    routing_options=sigmoid_gate,
    gate_class="Step3p7TopKRouter",
    expert_options=None,
    preset=Preset(
        supported="Step-3.7-Flash (the name step-3.7-flash)",
        names=r"step-3\.7-flash(-.*)?",
        num_experts_per_tok=8,
        prune_layers=(5, 8, 12),
    ),
    checkpoint="stepfun-ai/Step-3.7-Flash",
)
