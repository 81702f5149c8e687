"""dots3-note: layers whose indexer chooses keys, which may prune, and sliding ones of another shape."""

from fastmmoe.families.architecture import Architecture, head_gate_weights
from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import grouped_sigmoid_gate
from fastmmoe.families.tiling import grid_tilings

DOTS3_NOTE = Family(
    title="dots3-note",
    parent_type="dots3_note",
    text_type="dots3_note_text",
    placeholders=("image_token_id", "video_token_id"),
    videos=True,
    mixer_weights=head_gate_weights,
    routing_options=grouped_sigmoid_gate,
    gate_class="Dots3NoteTextTopkRouter",
    prunable_kinds=("full_attention", "indexed_attention"),
    preset=Preset(
        supported="dots3-note (the name dots3-note-prev)",
        names=r"dots3-note(-.*)?",
        num_experts_per_tok=8,
        prune_layers=(5, 9, 13),
    ),
    architectures={
        "dots3-note-prev": Architecture.of(
            mixer_weights=head_gate_weights,
            num_hidden_layers=46,
            hidden_size=5120,
            # two indexed layers, then one in four
            layer_types=["indexed_attention" if i == 0 or i % 4 == 1 else "sliding_attention" for i in range(46)],
            sliding_window=512,
            num_attention_heads=128,
            kv_lora_rank=512,
            q_lora_rank=1024,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            v_head_dim=128,
            swa_num_attention_heads=64,
            swa_kv_lora_rank=1024,
            swa_qk_nope_head_dim=192,
            index_topk=2048,
            index_head_dim=128,
            index_n_heads=64,
            n_routed_experts=256,
            num_experts_per_tok=8,
            moe_intermediate_size=1536,
            intermediate_size=13824,
            n_shared_experts=1,
            first_k_dense_replace=1,
        )
    },
    checkpoint="rednote-hilab/dots3-note-prev",
    tilings=grid_tilings,
)
