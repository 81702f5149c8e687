"""A prune stage: tokens go between a prune layer's attention and its MoE, or behind the layer.

The layer adds what the MoE returns to its own, longer residual stream. So the sum is made here, over the tokens that
are left, and the layer, which gets zeros, is made to return it (`layer.py`).
"""

from typing import Any

import torch
from torch import nn

from fastmmoe.methods.method import StageInput
from fastmmoe.prefill.patch import HookPatch, Patch
from fastmmoe.prefill.routing import gate_probs
from fastmmoe.prefill.running import RUNNING
from fastmmoe.prefill.sequence import NO_EFFECT, ForwardPass, Segment, Stage
from fastmmoe_kernels import PrunedBatch


class NormPatch(Patch):
    """Takes tokens away behind the norm in front of the MoE, whose input is the residual stream."""

    __slots__ = ()
    part = "norm"

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden, stage = self.stock(hidden_states), _stage_at(self)
        if stage is None:
            return hidden
        pruned = prune(RUNNING.forward, self.installation.layer(self.number), hidden, hidden_states)
        stage.residual = pruned.residual
        return pruned.hidden


class MoEPatch(HookPatch):
    """Adds what the MoE makes of the tokens that are left to their residual stream."""

    __slots__ = ()
    part = "MoE"

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        stage = _stage_at(self)
        if stage is None:
            return None
        if stage.residual is None:
            raise RuntimeError(NO_EFFECT.format(f"the attention of prune layer {self.number}"))
        # some return the gate's scores as well, and some the rows of all samples in one
        mixed, *others = output if isinstance(output, tuple) else (output,)
        layer = self.installation.layer(self.number)
        stage.short = self.installation.family.combine(layer, stage.residual, mixed.view_as(stage.residual))
        rows, tokens = RUNNING.forward.segments[-2].shape
        shape = (rows, tokens) if mixed.dim() == 3 else (rows * tokens,)
        zeros = mixed.new_zeros(()).expand(*shape, mixed.shape[-1])
        return (zeros, *others) if isinstance(output, tuple) else zeros


class MoEArgumentsPatch(Patch):
    """Cuts what the MoE is called with beside the tokens like the tokens."""

    __slots__ = ()
    part = "MoE"

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        stage = _stage_at(self)
        if stage is None or stage.residual is None:
            return self.stock(hidden, *args, **kwargs)
        forward = RUNNING.forward
        number = len(forward.segments) - 1

        def cut(value: Any) -> Any:
            full = next((full for entering, full in stage.per_token if entering is value), None)
            return value if full is None else forward.gathered("per_token", "", number, full)

        kwargs = {name: cut(value) for name, value in kwargs.items()}
        return self.stock(hidden, *map(cut, args), **kwargs)


def _stage_at(patch: Patch | HookPatch) -> Stage | None:
    """The stage that the forward under way runs in front of the MoE, if it has anything to prune there."""
    forward = RUNNING.forward
    if forward is None or not patch.live or forward.installation is not patch.installation:
        return None
    # another plan, which is not this forward's, may have put the patch there
    return None if forward.plan.config.prunes_behind_layer else forward.stage


def prune(forward: ForwardPass, layer: nn.Module, hidden: torch.Tensor, residual: torch.Tensor) -> PrunedBatch:
    """Shorten a batch at the stage under way, and let the layers behind know."""
    stage, segment, device, plan = forward.stage, forward.segments[-1], hidden.device, forward.plan
    if plan.pruning.looks and stage.seen is None:
        raise RuntimeError("fastmmoe: no effect: a prune layer's attention did not ask which implementation to call")
    family = forward.installation.family

    def probabilities(tokens: torch.Tensor) -> torch.Tensor:
        return gate_probs(forward, layer, tokens, family, plan.config.backend)

    packing = segment.packing
    if packing is not None:
        hidden, residual = packing.pad(hidden), packing.pad(residual)
    pruned = plan.pruning.prune(
        StageInput(
            stage=stage.number,
            hidden=hidden,
            residual=residual,
            layout=segment.layout.to(device),
            seen=None if stage.seen is None else stage.seen.to(device),
            prompt=None if forward.prompt is None else forward.prompt.to(device),
            gate_probs=probabilities,
            source=None if segment.index is None else segment.index.to(device),
        )
    )
    forward.segments.append(Segment.after(pruned, packed=packing is not None))
    if packing is None:
        return pruned
    pack = forward.segments[-1].packing.pack
    return pruned._replace(hidden=pack(pruned.hidden), residual=pack(pruned.residual))
