"""dots3-note: layers whose indexer chooses keys, which may prune, and sliding ones of another shape."""

from fastmmoe.families.family import Family, Preset
from fastmmoe.families.gates import grouped_sigmoid_gate
from fastmmoe.families.tiling import grid_tilings

DOTS3_NOTE = Family(
    title="dots3-note",
    parent_type="dots3_note",
    text_type="dots3_note_text",
    placeholders=("image_token_id", "video_token_id"),
    videos=True,
    routing_options=grouped_sigmoid_gate,
    gate_class="Dots3NoteTextTopkRouter",
    prunable_kinds=("full_attention", "indexed_attention"),
    preset=Preset(
        supported="dots3-note (the name dots3-note-prev)",
        names=r"dots3-note(-.*)?",
        num_experts_per_tok=8,
        prune_layers=(5, 9, 13),
    ),
    checkpoint="rednote-hilab/dots3-note-prev",
    tilings=grid_tilings,
)
