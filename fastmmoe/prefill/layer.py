"""A decoder layer at or behind the first prune layer: what is left of its arguments, and what it returns."""

from typing import Any

from fastmmoe.families.kinds import layer_kind
from fastmmoe.prefill.cache import cache_in
from fastmmoe.prefill.patch import Patch
from fastmmoe.prefill.running import RUNNING
from fastmmoe.prefill.sequence import NO_EFFECT, ForwardPass, Stage
from fastmmoe.prefill.stage import prune


class LayerPatch(Patch):
    """Runs a decoder layer on the tokens that are left, and at a prune layer returns fewer than it got.

    Attributes:
        kind: of its attention.
        cache_layer: the number by which the cache knows it: that which its attention was made with.
    """

    __slots__ = ("kind", "cache_layer")

    def prepare(self) -> None:
        super().prepare()
        self.kind = layer_kind(self.installation.text.config, self.number)
        attention = self.module._modules.get(self.installation.family.attention)
        self.cache_layer = getattr(attention, "layer_idx", self.number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = RUNNING.forward
        if forward is None or not self.live or forward.installation is not self.installation:
            return self.stock(*args, **kwargs)
        plan = forward.plan
        place = self.places.get(plan)
        if place is None:
            return self.stock(*args, **kwargs)
        if forward.injected is not None:
            args, kwargs = self._with_features(forward, args, kwargs)
        cut = self._shorten_arguments(forward, place.behind, args, kwargs)
        if not forward.has_vision or place.stage is None:
            return self._injected(forward, self.stock(*args, **kwargs))
        # the text model makes the cache itself if it was not given one
        cache = cache_in(kwargs)
        forward.cache = forward.cache if cache is None else cache
        if not plan.pruning.prunes(place.stage, forward.segments[-1].layout):
            forward.segments.append(forward.segments[-1])
            return self._injected(forward, self.stock(*args, **kwargs))
        stage = forward.stage = Stage(place.stage, self.kind, cut)
        output = self.stock(*args, **kwargs)
        if plan.config.prunes_behind_layer:
            hidden = output[0] if isinstance(output, tuple) else output
            stage.short = prune(forward, self.module, hidden, hidden).hidden
        forward.stage = None
        if stage.short is None:
            raise RuntimeError(NO_EFFECT.format(f"the attention of prune layer {self.number}"))
        short = (stage.short, *output[1:]) if isinstance(output, tuple) else stage.short
        return self._injected(forward, short)

    def _with_features(self, forward: ForwardPass, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The layer's arguments, with what the model adds to vision tokens behind the layer before.

        Not in that layer's output: hidden states are those that layers return.
        """
        if args:
            return (forward.inject(self.number - 1, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": forward.inject(self.number - 1, kwargs["hidden_states"])}

    def _injected(self, forward: ForwardPass, output: Any) -> Any:
        """The layer's output, with what the model adds behind it to vision tokens where no layer follows."""
        if forward.injected is None or self.number + 1 < self.installation.num_layers:
            return output
        if isinstance(output, tuple):
            return (forward.inject(self.number, output[0]), *output[1:])
        return forward.inject(self.number, output)

    def _shorten_arguments(
        self, forward: ForwardPass, behind: int, args: tuple, kwargs: dict[str, Any]
    ) -> list[tuple[Any, Any]]:
        """Give the layer, which is behind so many prune layers, the arguments of the tokens that are left.

        Returns:
            the arguments that the MoE is handed on, as (what the layer gets, what it was cut from).
        """
        family, segment = self.installation.family, forward.segment(behind)
        per_token = {name: kwargs.get(name) for name in family.per_token}
        unchanged = [(value, value) for value in per_token.values()]
        if segment.index is None and forward.state is None:
            return unchanged
        # decoding without padding is the stock path
        is_decoding = not forward.has_vision and kwargs.get("attention_mask") is None and forward.is_full(behind)
        if is_decoding and family.positions != "slot":
            return unchanged
        if segment.index is not None and forward.cache is not None:
            removed = forward.segments[0].shape[1] - segment.shape[1]
            for cached in forward.cache.layers[self.cache_layer : self.cache_layer + 1]:
                family.shorten_cache(cached, removed)
        hidden = args[0] if args else kwargs["hidden_states"]
        if not is_decoding:
            kwargs["attention_mask"] = forward.attention_mask_for(behind, self.kind, self.cache_layer, hidden)
        if family.positions == "slot":
            kwargs["position_ids"] = forward.slots(behind, hidden.device)
        if segment.index is None:
            return unchanged

        def cut(name: str, value: Any, dim: int = 1) -> Any:
            return forward.gathered(name, self.kind, behind, value, dim)

        kwargs["position_embeddings"] = cut("position_embeddings", kwargs.get("position_embeddings"))
        if family.positions == "source":
            kwargs["position_ids"] = cut("position_ids", kwargs.get("position_ids"), -1)
        elif family.positions == "none":
            # gaps in position ids look like packed sequences to flash attention
            kwargs["position_ids"] = None
        shorter = {name: cut(name, value) for name, value in per_token.items()}
        kwargs.update({name: value for name, value in shorter.items() if name in kwargs})
        if segment.packing is not None and forward.mask.pairs is None:
            bounds, longest = segment.packing.bounds, max(segment.layout.lengths)
            kwargs |= dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
            kwargs |= dict(max_length_q=longest, max_length_k=longest)
        return [(shorter[name], value) for name, value in per_token.items()]
