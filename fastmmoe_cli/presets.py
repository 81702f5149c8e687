"""The preset of a checkpoint's family, at layers that it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastmmoe_cli.console import stderr

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fastmmoe import FastMMoEConfig


def preset_for(model: PreTrainedConfig, **settings: Any) -> FastMMoEConfig:
    """`FastMMoEConfig.preset`; where a model has too few layers for it, at the same shares of its depth, and says so.

    Raises:
        ValueError, TypeError: what `preset` raises for other reasons.
    """
    from fastmmoe import FastMMoEConfig
    from fastmmoe.families import architecture_of
    from fastmmoe.methods.fastmmoe import fitting_layers

    try:
        return FastMMoEConfig.preset(model, **settings)
    except ValueError:
        if settings.get("prune_layers") is not None or settings.get("retention", 1.0) == 1.0:
            raise
        depth = architecture_of(model).num_hidden_layers
        layers = fitting_layers(model, depth)
        try:
            config = FastMMoEConfig.preset(model, **settings | {"prune_layers": layers})
        except ValueError:
            config = None
        if config is None or not layers:
            raise
    shown = ", ".join(map(str, layers))
    stderr.print(
        f"note: the preset's prune layers do not fit a model of {depth} layers; taken at the same shares of its depth: "
        f"{shown} (--prune-layers says others)", soft_wrap=True, highlight=False,
    )  # fmt: skip
    return config
