"""Switch FastMMoE on and off on a transformers model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastmmoe.config import ReductionConfig
from fastmmoe.hooks import Hooks
from fastmmoe_kernels import VisionLayout

ATTRIBUTE = "_fastmmoe_hooks"


def enable(model: nn.Module, config: ReductionConfig) -> None:
    """Run every prefill of `model` with FastMMoE from now on; decoding stays the stock path.

    A model that is enabled already gets the new config. After an error it is as it was before the call.

    Args:
        model: a supported multimodal MoE model from transformers, in evaluation mode.
        config: what to reduce, see `FastMMoEConfig`; `FastMMoEConfig.preset(model, retention=0.5)` for a start. One of
            `fastmmoe.baselines` prunes as other methods do.

    Raises:
        TypeError: `model` is no module or `config` neither a FastMMoEConfig nor a baseline's.
        ValueError: unsupported model type, training mode, prune layers that are no MoE layers, or any other
            combination that could not work; names the argument.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, ReductionConfig):
        raise TypeError(f"config: expected a FastMMoEConfig or a baseline's config, got {type(config).__name__}")
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
def enabled(model: nn.Module, config: ReductionConfig) -> Iterator[nn.Module]:
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


@contextmanager
def fixed_layout(model: nn.Module, layout: VisionLayout) -> Iterator[nn.Module]:
    """Within a `with` block, every forward of this thread on an enabled model is a prefill with this layout.

    Nothing is read from the device then, so that a whole prefill of the language model can be captured by
    `torch.cuda.graph` (after a warm-up, with `inputs_embeds` and an empty cache or none), and a layout made from ids on
    the CPU costs no wait. `config.min_vision_tokens` does not apply. Keep `layout` as long as the graph.

    Args:
        model: a model on which FastMMoE is enabled.
        layout: where the vision tokens of the coming forwards are: `VisionLayout.from_mask(input_ids == image_token_id,
            attention_mask)`.

    Raises:
        RuntimeError: FastMMoE is not enabled on `model`.
        TypeError: `layout` is no VisionLayout.
        ValueError: in a forward whose shape is not the layout's, whose cache is not empty, or that brings no attention
            mask for a layout with padding.
    """
    hooks = hooks_of(model)
    if hooks is None:
        raise RuntimeError("model: FastMMoE is not enabled; call fastmmoe.enable(model, config) first")
    if not isinstance(layout, VisionLayout):
        raise TypeError(f"layout: expected a VisionLayout, got {type(layout).__name__}")
    with hooks.fixed_layout(layout):
        yield model


def hooks_of(model: nn.Module) -> Hooks | None:
    """The hooks that `enable` put on a model; None when it is not enabled."""
    return model.__dict__.get(ATTRIBUTE)
