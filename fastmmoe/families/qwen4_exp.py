"""Qwen4-Exp, whose layers mix several residual streams."""

from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import softmax_gate

QWEN4_EXP = Family(
    title="Qwen4-Exp",
    parent_type="qwen4_exp",
    text_type="qwen4_exp_text",
    placeholders=("image_token_id", "video_token_id"),
    videos=True,
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
    checkpoint="Qwen/Qwen4-Exp",
)
