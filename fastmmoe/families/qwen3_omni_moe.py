"""The thinker of Qwen3-Omni with experts: its images and videos; audio tokens count as text."""

from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import softmax_gate
from fastmmoe.families.qwen3_moe import QWEN3_30B_A3B
from fastmmoe.families.tiling import grid_tilings

QWEN3_OMNI_MOE = Family(
    title="Qwen3-Omni-MoE",
    parent_type="qwen3_omni_moe_thinker",
    text_type="qwen3_omni_moe_text",
    placeholders=("image_token_id", "video_token_id"),
    videos=True,
    routing_options=softmax_gate,
    gate_class="Qwen3OmniMoeThinkerTextTopKRouter",
    injected=("visual_pos_masks", "deepstack_visual_embeds"),
    hidden_states_obstacle="the talker looks up the prompt's tokens in them; expected generate(..., "
    "return_audio=False), or vision_top_k without pruning",
    preset=Preset(
        supported="Qwen3-Omni-MoE (the name qwen3-omni-30b-a3b)",
        names=r"qwen3-omni-30b-a3b(-.*)?",
        num_experts_per_tok=8,
        prune_layers=(5, 8, 12),
    ),
    architectures={"qwen3-omni-30b-a3b": QWEN3_30B_A3B},
    checkpoint="Qwen/Qwen3-Omni-30B-A3B-Instruct",
    tilings=grid_tilings,
)
