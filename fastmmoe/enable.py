"""Switch FastMMoE on and off on a transformers model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastmmoe.config import FastMMoEConfig
from fastmmoe.hooks import Hooks

ATTRIBUTE = "_fastmmoe_hooks"


def enable(model: nn.Module, config: FastMMoEConfig) -> None:
    """Run every prefill of `model` with FastMMoE from now on; decoding stays the stock path.

    A model that is enabled already gets the new config. After an error it is as it was before the call.

    Args:
        model: a supported multimodal MoE model from transformers, in evaluation mode.
        config: what to reduce, see `FastMMoEConfig`; `FastMMoEConfig.preset(model, retention=0.5)` for a start.

    Raises:
        TypeError: `model` is no module or `config` no FastMMoEConfig.
        ValueError: unsupported model type, training mode, prune layers that are no MoE layers, or any other
            combination that could not work; names the argument.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, FastMMoEConfig):
        raise TypeError(f"config: expected a FastMMoEConfig, got {type(config).__name__}")
    before = hooks_of(model)
    if before is not None:
        before.remove()
    try:
        hooks = Hooks(model, config)
        hooks.install()
    except BaseException:
        if before is not None:
            before.install()
        raise
    object.__setattr__(model, ATTRIBUTE, hooks)


def disable(model: nn.Module) -> None:
    """Give the stock model back, bit for bit. Does nothing on a model that is not enabled."""
    hooks = hooks_of(model)
    if hooks is not None:
        hooks.remove()
        object.__delattr__(model, ATTRIBUTE)


@contextmanager
def enabled(model: nn.Module, config: FastMMoEConfig) -> Iterator[nn.Module]:
    """Enable FastMMoE within a `with` block; afterwards the model is as it was before, enabled or not.

    Raises: as `enable`.
    """
    before = hooks_of(model)
    enable(model, config)
    try:
        yield model
    finally:
        disable(model)
        if before is not None:
            before.install()
            object.__setattr__(model, ATTRIBUTE, before)


def hooks_of(model: nn.Module) -> Hooks | None:
    """The hooks that `enable` put on a model; None when it is not enabled."""
    return model.__dict__.get(ATTRIBUTE)
