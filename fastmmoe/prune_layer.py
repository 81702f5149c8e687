"""The hooks of one prune layer, which passes through them in this order.

At its start: whether anything is to go. In its attention: the pruning looks at the call. Then either in front of its
MoE: norm (its input is the residual stream), MoE (gets fewer tokens), layer (returns the shorter stream); or behind
the layer, whose output is shortened. Where nothing is to go, all of them let the layer alone.
"""

import functools
from typing import Any

import torch
from torch import nn

from fastmmoe import attention
from fastmmoe.adapters.adapter import Adapter
from fastmmoe.attention import AttentionCall
from fastmmoe.gates import gate_probs
from fastmmoe.patches import Patches
from fastmmoe.prefill import ForwardPass, Segment, Stage, ThreadState
from fastmmoe.pruning import Pruning, StageInput
from fastmmoe_kernels import PrunedBatch


class PruneLayer:
    """One prune layer of a model.

    Args:
        stage: number of the prune layer among all of them.
        layer: the decoder layer.
        pruning: what is done there.
        local: the state that all hooks share.
    """

    def __init__(self, stage: int, layer: nn.Module, adapter: Adapter, pruning: Pruning, local: ThreadState):
        self.stage = stage
        self._layer, self._adapter, self._pruning, self._local = layer, adapter, pruning, local

    def install(self, patches: Patches) -> None:
        """Put the hooks on the layer."""
        layer, adapter = self._layer, self._adapter
        if self._pruning.looks:
            module = getattr(layer, adapter.attention)
            implementation = functools.partial(self._attn_implementation, module.config)
            patches.put(module, attention.CAPTURE, self._look)
            patches.put(
                module, "config", attention.OverriddenConfig(module.config, _attn_implementation=implementation)
            )
        if self._pruning.config.prunes_behind_layer:
            patches.after(layer, self._prune_output)
        else:
            patches.before(getattr(layer, adapter.norm), self._before_norm)
            patches.before(adapter.moe_of(layer), self._before_moe)
            patches.after(adapter.moe_of(layer), self._after_moe)
            patches.after(layer, self._return_short_stream)

    def enter(self, current: ForwardPass, kwargs: dict[str, Any]) -> None:
        """At the start of the layer, in a forward with vision tokens."""
        # the text model makes the cache itself if it was not given one
        current.cache = kwargs.get("past_key_values", current.cache)
        current.stage = None
        if self._pruning.prunes(self.stage, current.segments[-1].layout):
            current.stage = Stage(kwargs["position_embeddings"])
        else:
            current.segments.append(current.segments[-1])

    @property
    def _running(self) -> Stage | None:
        """The stage that the current forward runs here, if it has anything to prune."""
        current = self._local.forward_pass
        return None if current is None else current.stage

    # ---------------------------------------------------------------- attention

    def _attn_implementation(self, config: Any) -> str:
        stage = self._running
        return attention.NAME if stage is not None and stage.seen is None else config._attn_implementation

    def _look(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        current = self._local.forward_pass
        behind, packing = len(current.segments) - 1, current.segments[-1].packing
        mask = None if current.is_full(behind) else current.key_mask(behind, key.device)
        if packing is not None:
            query, key = packing.pad(query, dim=2), packing.pad(key, dim=2)
        # a static cache is longer than its contents
        key = key[:, :, : current.key_count(behind)]
        layout = current.segments[-1].layout.to(query.device)
        current.stage.seen = self._pruning.look(AttentionCall(query, key, scale, layout, mask, current.back))

    # ---------------------------------------------------------------- in front of the MoE

    def _before_norm(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        stage = self._running
        if stage is not None:
            stage.residual = args[0] if args else kwargs["hidden_states"]

    def _before_moe(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        stage = self._running
        if stage is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        pruned = self._prune(hidden, stage.residual.to(hidden.device))
        stage.residual, stage.short_residual = None, pruned.residual
        if args:
            return (pruned.hidden, *args[1:]), kwargs
        return args, dict(kwargs, hidden_states=pruned.hidden)

    def _after_moe(self, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
        stage = self._running
        if stage is None:
            return None
        stage.short_residual = stage.short_residual + output.view_as(stage.short_residual)
        # the layer adds this to its own, longer residual stream; `_return_short_stream` returns the short sum instead
        longer = self._local.forward_pass.segments[-2].shape
        return output.new_zeros(()).expand(*longer, output.shape[-1])

    def _return_short_stream(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        stage = self._running
        if stage is None or stage.short_residual is None:
            return None
        self._local.forward_pass.stage = None
        return _with_hidden(output, stage.short_residual)

    # ---------------------------------------------------------------- behind the layer

    def _prune_output(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if self._running is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        pruned = self._prune(hidden, hidden)
        self._local.forward_pass.stage = None
        return _with_hidden(output, pruned.hidden)

    # ---------------------------------------------------------------- in both places

    def _prune(self, hidden: torch.Tensor, residual: torch.Tensor) -> PrunedBatch:
        """Shorten a batch, and let the layers behind know."""
        current = self._local.forward_pass
        stage, segment, device = current.stage, current.segments[-1], hidden.device
        if self._pruning.looks and stage.seen is None:
            raise RuntimeError(
                "fastmmoe: no effect: a prune layer's attention did not ask which implementation to call"
            )
        rope, packing = stage.rope, segment.packing
        if packing is not None:
            hidden, residual, *rope = map(packing.pad, (hidden, residual, *rope))
        pruned = self._pruning.prune(
            StageInput(
                stage=self.stage,
                hidden=hidden,
                residual=residual,
                layout=segment.layout.to(device),
                seen=None if stage.seen is None else stage.seen.to(device),
                prompt=None if current.prompt is None else current.prompt.to(device),
                gate_probs=self._gate_probs,
                rope=tuple(table.to(device) for table in rope),
                source=None if segment.index is None else segment.index.to(device),
            )
        )
        current.segments.append(Segment.after(pruned, packed=packing is not None))
        if packing is None:
            return pruned
        pack = current.segments[-1].packing.pack
        return pruned._replace(hidden=pack(pruned.hidden), residual=pack(pruned.residual))

    def _gate_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        gate = self._adapter.gate_of(self._layer)
        return gate_probs(gate, hidden, self._adapter.routing_options(gate), self._pruning.config.backend)


def _with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """A layer's output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
