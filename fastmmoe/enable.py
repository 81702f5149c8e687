"""Switch FastMMoE on and off on a transformers model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastmmoe.config import ReductionConfig
from fastmmoe.prefill.block import Block
from fastmmoe.prefill.installation import installation_for, installation_of
from fastmmoe.prefill.plan import Plan
from fastmmoe.versions import warn_of_untested
from fastmmoe_kernels import VisionLayout


def enable(model: nn.Module, config: ReductionConfig) -> None:
    """Run every prefill of `model` with FastMMoE from now on; decoding stays the stock path unless text skips experts.

    A model that is enabled already gets the new config, whichever of its modules or wrappers it is reached by. After an
    error it is as it was before the call. Threads may call one enabled model, and may enable and disable it: a forward
    ends under the config with which it began. A deep copy of an enabled model, or one by pickle, is a stock model.

    Which token asks: a prompt's last one. With `logits_to_keep=k` and k > 1 the last k - 1 tokens are candidates (of
    assisted decoding) or answers to be scored, and the token in front of them asks; so logits may depend on k. With
    `use_cache=False`, `generate` prunes anew at every step, and what it has said so far asks. A prompt of
    `inputs_embeds` without vision features runs on the stock model, with a warning: see `fixed_layout`. Versions of
    torch, transformers or Triton outside of the tested range get a warning, too.

    Args:
        model: a supported multimodal MoE model from transformers, in evaluation mode; with its language head, since
            `logits_to_keep` is not known below.
        config: what to reduce, see `FastMMoEConfig`; `FastMMoEConfig.preset(model, retention=0.5)` for a start. Another
            one of `fastmmoe.methods` prunes as other methods do.

    Raises:
        TypeError: `model` is no module or `config` is no method's config.
        ValueError: unsupported model type, training mode, prune layers that are no MoE layers, or any other
            combination that could not work; names the argument.
    """
    _check_arguments(model, config)
    installation = installation_for(model)
    installation.set_plan(Plan.of(installation.family, installation.text, config))


def disable(model: nn.Module) -> None:
    """Give the stock model back, bit for bit. Does nothing on a model that is not enabled.

    Within an `enabled` block of the same thread, for the rest of that block.
    """
    installation = installation_of(model)
    if installation is not None:
        installation.set_plan(None)


@contextmanager
def enabled(model: nn.Module, config: ReductionConfig) -> Iterator[nn.Module]:
    """Enable FastMMoE within a `with` block; afterwards the model is as it was before, enabled or not.

    A block counts for the thread or asyncio task that entered it, as those of torch do; blocks of several may overlap.
    A thread that is started within a block is in none: it runs what `enable` made of the model, with a warning; start
    it by `contextvars.copy_context().run`, or enter a block in it. A generator that is suspended within a block leaves
    it open to whoever runs the generator. `enable` and `disable` within a block change what is in force in that block.

    Raises: as `enable`.
    """
    _check_arguments(model, config)
    installation = installation_for(model)
    plan = Plan.of(installation.family, installation.text, config)
    block = None
    try:
        block = installation.open_block(plan)
        yield model
    finally:
        if block is not None:
            block.close()


@contextmanager
def fixed_layout(model: nn.Module, layout: VisionLayout) -> Iterator[nn.Module]:
    """Within a `with` block, every forward of this thread or task on an enabled model is a prefill with this layout.

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
    installation = installation_of(model)
    if installation is None or installation.plan is None:
        raise RuntimeError("model: FastMMoE is not enabled; call fastmmoe.enable(model, config) first")
    if not isinstance(layout, VisionLayout):
        raise TypeError(f"layout: expected a VisionLayout, got {type(layout).__name__}")
    device = next(installation.text.parameters()).device
    if device.type != "meta":  # once, and not in every forward
        layout = layout.to(device)
    block = Block(installation, layout=layout)
    try:
        yield model
    finally:
        block.close()


def _check_arguments(model: nn.Module, config: ReductionConfig) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, ReductionConfig):
        raise TypeError(f"config: expected a FastMMoEConfig or another method's config, got {type(config).__name__}")
    warn_of_untested()
