"""Step-3.7-Flash: full and sliding attention, of which the former may prune."""

from fastmmoe.families.architecture import Architecture, head_gate_weights
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import sigmoid_gate

STEP3P7 = Family(
    title="Step-3.7",
    parent_type="step3p7",
    text_type="step3p5",
    placeholders=("image_token_id",),
    features=("pixel_values", "pixel_values_local", "mm_encoder_outputs"),
    mixer_weights=head_gate_weights,
    routing_options=sigmoid_gate,
    gate_class="Step3p7TopKRouter",
    plain_experts="Step3p7Experts",
    preset=Preset(
        supported="Step-3.7-Flash (the name step-3.7-flash)",
        names=r"step-3\.7-flash(-.*)?",
        num_experts_per_tok=8,
        prune_layers=(8, 12, 16),
    ),
    architectures={
        "step-3.7-flash": Architecture.of(
            mixer_weights=head_gate_weights,
            num_hidden_layers=45,
            hidden_size=4096,
            layer_types=["full_attention" if i % 4 == 0 else "sliding_attention" for i in range(45)],
            sliding_window=512,
            num_attention_heads=64,
            num_sliding_attention_heads=96,
            num_key_value_heads=8,
            head_dim=128,
            n_routed_experts=288,
            num_experts_per_tok=8,
            moe_intermediate_size=1280,
            intermediate_size=11264,
            share_expert_dim=1280,
            first_k_dense_replace=3,
        )
    },
    checkpoint="stepfun-ai/Step-3.7-Flash",
)
