"""What a pruned cache must remember, so that later forwards on it know which of its keys stand for which tokens."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask

from fastmmoe.prefill.running import RUNNING

# what transformers calls a cache among the arguments of its functions; callers may use the older name still
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
CACHE_STATE = "_fastmmoe_state"  # attribute of a transformers cache: CacheState


@dataclass
class CacheState:
    """What a pruned cache remembers of its first `length` tokens (counted before pruning), per segment.

    Attributes:
        prune_layers, prunes_behind_layer: where it was pruned, as in the config.
        length: tokens of the full sequence that the prefixes stand for.
        tail: how many of those at the end were never pruned, so that the cache may be cropped by as many.
        prefixes: per segment, (int64 [B, kept]: which token of the full sequence each key stands for, -1 at padding;
            whether no key is padding).
        seen: tokens of the full sequence in the cache, later text included.
        full_since: whether all tokens behind the prefixes are valid.
        packed: several samples stand in its one row, so that nothing can be decoded from it.
    """

    prune_layers: tuple[int, ...]
    prunes_behind_layer: bool
    length: int
    tail: int
    prefixes: list[tuple[torch.Tensor, bool]]
    seen: int
    full_since: bool = True
    packed: bool = False

    @property
    def batch_size(self) -> int:
        return self.prefixes[0][0].shape[0]

    def crop_to(self, seen: int) -> None:
        """Follow a cache that was cropped to `seen` tokens of the full sequence.

        Raises:
            RuntimeError: the crop reaches into the pruned vision tokens.
        """
        removed = self.length - seen
        if removed > self.tail:
            raise RuntimeError(
                f"{CACHE}: cropped to {seen} tokens, into the {self.length - self.tail} that hold pruned "
                "vision tokens; start from a fresh cache"
            )
        if removed > 0:
            self.length, self.tail = seen, self.tail - removed
            self.prefixes = [(tokens[:, : tokens.shape[1] - removed], full) for tokens, full in self.prefixes]
        self.seen = seen

    def select(self, rows: torch.Tensor) -> None:
        """Follow a cache whose rows are now those of the old `rows`."""
        self.prefixes = [(tokens[rows.to(tokens.device)], full) for tokens, full in self.prefixes]

    def repeat(self, repeats: int) -> None:
        """Follow a cache each of whose rows now stands `repeats` times in a row."""
        self.prefixes = [(tokens.repeat_interleave(repeats, dim=0), full) for tokens, full in self.prefixes]


class _Pruned:
    """Mixed into the class of a pruned cache: operations on its rows take its state along, and only ours extend it."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        state_of(self).select(beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        super().batch_select_indices(indices)
        state_of(self).select(torch.as_tensor(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        state_of(self).repeat(repeats)

    def reset(self) -> None:
        super().reset()
        forget(self)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        if layer_idx == 0:
            forward = RUNNING.forward
            if forward is None or forward.cache is not self:
                layers = state_of(self).prune_layers
                raise RuntimeError(
                    f"{CACHE}: holds vision tokens that were pruned at layers {layers}, and FastMMoE is not "
                    "enabled on the model that now runs on it; enable it as it was, or start from a fresh cache"
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def __reduce__(self) -> tuple:
        return _restored, (type(self).__mro__[2], self.__dict__)


@cache
def _pruned_class(kind: type) -> type:
    return type(kind.__name__, (_Pruned, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _restored(kind: type, attributes: dict[str, Any]) -> Cache:
    """A pruned cache out of its pickle."""
    cache = _pruned_class(kind).__new__(_pruned_class(kind))
    cache.__dict__.update(attributes)
    return cache


def cache_in(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among a forward's arguments or outputs, by whichever of its names."""
    found = arguments.get("past_key_values")
    return arguments.get("cache") if found is None else found


def is_paged(cache: object) -> bool:
    """Whether it is that of transformers' continuous batching: forwards mix the tokens of several requests."""
    return type(cache).__name__ == "PagedAttentionCache"


def state_of(cache: Cache | None) -> CacheState | None:
    """What a cache remembers of its pruned tokens; None: it holds none."""
    return getattr(cache, CACHE_STATE, None)


def check_lengths(cache: Cache, first_stage: int) -> None:
    """Refuse a cache that was pruned but remembers nothing of it, as one made anew from the tensors of another.

    Raises:
        RuntimeError: a layer behind the first prune layer holds fewer tokens than that one.
    """
    ends = cache.layers[first_stage : first_stage + 1] + cache.layers[-1:]
    if len(ends) < 2 or any(type(layer) is not DynamicLayer for layer in ends):
        return  # others count on the device, or have reasons of their own to be shorter
    full, last = (layer.get_seq_length() for layer in ends)
    if 0 < last < full:
        raise RuntimeError(
            f"{CACHE}: its layers hold {full} tokens and {last}: vision tokens were pruned, and which of them is not "
            "known any more; go on with the cache itself, or its copy.deepcopy, or start from a fresh one"
        )


def remember(cache: Cache, state: CacheState) -> None:
    """Leave a state on a cache."""
    setattr(cache, CACHE_STATE, state)
    if not isinstance(cache, _Pruned):
        cache.__class__ = _pruned_class(type(cache))


def forget(cache: Cache) -> None:
    """Make a cache that holds no pruned tokens any more a plain one again."""
    if isinstance(cache, _Pruned):
        delattr(cache, CACHE_STATE)
        cache.__class__ = type(cache).__mro__[2]
