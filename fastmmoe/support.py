"""Which models are supported, and how far: read from the registry."""

from dataclasses import dataclass

from fastmmoe import families as known
from fastmmoe.families import Family


@dataclass(frozen=True)
class FamilySupport:
    """One family of models: a text model under a multimodal one.

    Attributes:
        title: what it is called.
        parent_type, text_type: `config.model_type` of the multimodal model and of its text model.
        checkpoint: of a released one; "" where none is named.
        experts: whether vision tokens may take fewer.
        experts_note: who runs them; or why not.
        prunable_kinds: kinds of attention whose layers may prune, as in `config.layer_types`; () where none may.
        is_mixed: the checkpoint has layers of other kinds too.
        first_layer: the checkpoint's first layer with experts; None where none is known.
        preset_layers: where the preset prunes the checkpoint.
        pruning_note: why not; "" where it may.
        official: the preset is that of the official scripts.
        video: whether it takes videos.
    """

    title: str
    parent_type: str
    text_type: str
    checkpoint: str
    experts: bool
    experts_note: str
    prunable_kinds: tuple[str, ...]
    is_mixed: bool
    first_layer: int | None
    preset_layers: tuple[int, ...]
    pruning_note: str
    official: bool
    video: bool


def families() -> tuple[FamilySupport, ...]:
    """What is supported, one row per family.

    Other multimodal models of transformers, with one of these text models and image tokens, are supported as well.
    """
    return tuple(map(_support_of, known.FAMILIES))


def _support_of(family: Family) -> FamilySupport:
    no_experts = family.obstacle or family.expert_obstacle(None)
    layers = family.preset.prune_layers if family.preset else ()
    known = next(iter(family.architectures.values()), None)
    first = None if known is None else next(i for i, layer in enumerate(known.layers) if layer.mlp.expert)
    path = "the model's own, a row per token and expert" if family.own_experts else "kernel"
    return FamilySupport(
        title=family.title,
        parent_type=family.parent_type,
        text_type=family.text_type,
        checkpoint=family.checkpoint,
        experts=not no_experts,
        experts_note=no_experts or path,
        prunable_kinds=family.prunable_kinds if layers else (),
        is_mixed=known is not None and len({layer.mixer for layer in known.layers}) > 1,
        first_layer=first,
        preset_layers=layers,
        pruning_note="" if layers else family.obstacle or family.why_not_prune(None, 0),
        official=bool(family.preset and family.preset.official),
        video=family.videos,
    )


def table() -> str:
    """README's table, Markdown."""
    rows = [
        "| model | `model_type`s | checkpoint | fewer experts | preset prunes at layers | may prune from | video |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in families():
        types = f"`{row.parent_type}`, `{row.text_type}`"
        if row.preset_layers:
            at = ", ".join(map(str, row.preset_layers)) + (" (official)" if row.official else "")
            start = f"{row.first_layer}"
            start += f", at `{'` or `'.join(row.prunable_kinds)}` layers" if row.is_mixed else ""
        else:
            at, start = f"none: {row.pruning_note}", ""
        if row.experts or row.preset_layers:
            experts = row.experts_note if row.experts else f"no: {row.experts_note}"
        else:
            experts, at = "refused", row.pruning_note
        video = "yes" if row.video else ""
        rows.append(f"| {row.title} | {types} | {row.checkpoint} | {experts} | {at} | {start} | {video} |")
    return "\n".join(rows)
