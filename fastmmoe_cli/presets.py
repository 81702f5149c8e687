"""The preset of a checkpoint's family, at layers that it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastmmoe_cli.console import note

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fastmmoe import FastMMoEConfig


def preset_for(model: PreTrainedConfig | str, **settings: Any) -> FastMMoEConfig:
    """`FastMMoEConfig.preset` of `fitted` settings.

    Raises:
        ValueError, TypeError: what `preset` raises, but for too deep a preset.
    """
    from fastmmoe import FastMMoEConfig

    return FastMMoEConfig.preset(model, **fitted(model, settings))


def fitted(model: PreTrainedConfig | str, settings: dict[str, Any]) -> dict[str, Any]:
    """A preset's settings; with prune layers, and a word about them, where a model has too few layers for its own.

    Raises:
        ValueError, TypeError: what `FastMMoEConfig.preset` raises of these settings.
    """
    from fastmmoe import FastMMoEConfig
    from fastmmoe.methods.fastmmoe import PresetTooDeepError

    try:
        FastMMoEConfig.preset(model, **settings)
        return settings
    except PresetTooDeepError as error:
        if not error.fitting:
            raise
        _, depth, fitting = error.args
    settings = settings | {"prune_layers": fitting}
    FastMMoEConfig.preset(model, **settings)  # something else may be wrong with them
    note(
        f"the preset's prune layers do not fit a model of {depth} layers; taken at the same shares of its depth: "
        f"{', '.join(map(str, fitting))} (--prune-layers says others)"
    )
    return settings
