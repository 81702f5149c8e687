"""A prune stage: tokens go between a prune layer's attention and its MoE, or behind the layer.

The layer adds what the MoE returns to its own, longer residual stream. So the sum is made here, over the tokens that
are left, and the layer, which gets zeros, is made to return it (`layer.py`).
"""

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
        pruned = prune(RUNNING.forward, self.installation.layers[self.number], hidden, hidden_states)
        stage.residual = pruned.residual
        return pruned.hidden


class MoEPatch(HookPatch):
    """Adds what the MoE makes of the tokens that are left to their residual stream."""

    __slots__ = ()
    part = "MoE"

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        stage = _stage_at(self)
        if stage is None:
            return None
        if stage.residual is None:
            raise RuntimeError(NO_EFFECT.format(f"the attention of prune layer {self.number}"))
        stage.short = stage.residual + output.view_as(stage.residual)
        longer = RUNNING.forward.segments[-2].shape
        return output.new_zeros(()).expand(*longer, output.shape[-1])


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
        return gate_probs(forward, family.gate_of(layer), tokens, family, plan.config.backend)

    rope, packing = stage.rope, segment.packing
    if packing is not None:
        hidden, residual, *rope = map(packing.pad, (hidden, residual, *rope))
    pruned = plan.pruning.prune(
        StageInput(
            stage=stage.number,
            hidden=hidden,
            residual=residual,
            layout=segment.layout.to(device),
            seen=None if stage.seen is None else stage.seen.to(device),
            prompt=None if forward.prompt is None else forward.prompt.to(device),
            gate_probs=probabilities,
            rope=tuple(table.to(device) for table in rope),
            source=None if segment.index is None else segment.index.to(device),
        )
    )
    forward.segments.append(Segment.after(pruned, packed=packing is not None))
    if packing is None:
        return pruned
    pack = forward.segments[-1].packing.pack
    return pruned._replace(hidden=pack(pruned.hidden), residual=pack(pruned.residual))
