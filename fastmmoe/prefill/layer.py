"""A decoder layer at or behind the first prune layer: what is left of mask and RoPE, and what it returns."""

from typing import Any

from fastmmoe.prefill.patch import Patch
from fastmmoe.prefill.running import RUNNING
from fastmmoe.prefill.sequence import NO_EFFECT, ForwardPass, Stage
from fastmmoe.prefill.stage import prune


class LayerPatch(Patch):
    """Runs a decoder layer on the tokens that are left, and at a prune layer returns fewer than it got."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = RUNNING.forward
        if forward is None or not self.live or forward.installation is not self.installation:
            return self.stock(*args, **kwargs)
        number, plan = self.number, forward.plan
        behind = sum(prune_layer < number for prune_layer in plan.stages)
        self._shorten_arguments(forward, behind, args, kwargs)
        if not (forward.has_vision and number in plan.stages):
            return self.stock(*args, **kwargs)
        # the text model makes the cache itself if it was not given one
        forward.cache = kwargs.get("past_key_values", forward.cache)
        if not plan.pruning.prunes(plan.stages[number], forward.segments[-1].layout):
            forward.segments.append(forward.segments[-1])
            return self.stock(*args, **kwargs)
        stage = forward.stage = Stage(plan.stages[number], kwargs["position_embeddings"])
        output = self.stock(*args, **kwargs)
        if plan.config.prunes_behind_layer:
            hidden = output[0] if isinstance(output, tuple) else output
            stage.short = prune(forward, self.module, hidden, hidden).hidden
        forward.stage = None
        if stage.short is None:
            raise RuntimeError(NO_EFFECT.format(f"the attention of prune layer {number}"))
        return (stage.short, *output[1:]) if isinstance(output, tuple) else stage.short

    def _shorten_arguments(self, forward: ForwardPass, behind: int, args: tuple, kwargs: dict[str, Any]) -> None:
        """Give the layer, which is behind so many prune layers, the mask and the RoPE tables of the tokens left."""
        segment = forward.segment(behind)
        if segment.index is None and forward.state is None:
            return
        # decoding without padding is the stock path
        if not forward.has_vision and kwargs.get("attention_mask") is None and forward.is_full(behind):
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        # the cache counts by the number that the attention was made with
        layer = getattr(self.installation.family.attention_of(self.module), "layer_idx", self.number)
        kwargs["attention_mask"] = forward.attention_mask_for(behind, layer, hidden)
        if segment.index is not None:
            kwargs["position_embeddings"] = forward.rope(behind, hidden.device)
            # gaps in position ids look like packed sequences to flash attention, and RoPE is applied already
            kwargs["position_ids"] = None
        if segment.packing is not None and forward.mask.pairs is None:
            bounds, longest = segment.packing.bounds, max(segment.layout.lengths)
            kwargs |= dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
            kwargs |= dict(max_length_q=longest, max_length_k=longest)
