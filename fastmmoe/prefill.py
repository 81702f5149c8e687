"""The state of one forward pass: what each stretch of layers sees of the batch, and what its cache must remember."""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from fastmmoe_kernels import PruneOutput, VisionLayout

NO_EFFECT = "fastmmoe: no effect: only {} pruned or reduced; something in this model goes past its layers' modules"
CACHE_STATE = "_fastmmoe_state"  # attribute of a transformers cache: CacheState


@dataclass(frozen=True)
class Segment:
    """The new tokens of a forward as a stretch of layers sees them, from behind one prune layer to the next.

    Attributes:
        valid: bool [B, n'].
        is_full: host-known: every token is valid.
        layout: where the vision tokens are; None in a forward without vision tokens.
        index: int64 [B, n'], position of each token among the forward's input, -1 at padding; None: the input itself.
        merged: bool [B, n'], tokens that the prune stage in front of this stretch merged, for the report.
    """

    valid: torch.Tensor
    is_full: bool
    layout: VisionLayout | None = None
    index: torch.Tensor | None = None
    merged: torch.Tensor | None = None

    @classmethod
    def from_layout(cls, layout: VisionLayout) -> "Segment":
        return cls(layout.valid_mask, layout.is_full, layout)

    def after(self, pruned: PruneOutput) -> "Segment":
        """The segment behind a prune stage."""
        index = pruned.index
        if self.index is not None:
            index = torch.where(index >= 0, self.index.to(index.device).gather(1, index.clamp_min(0)), -1)
        return Segment(pruned.index >= 0, pruned.layout.is_full, pruned.layout, index, pruned.merged)

    @property
    def source(self) -> torch.Tensor:
        """int64 [B, n'], `index` with 0 at padding, for gathers."""
        return self.index.clamp_min(0)


@dataclass
class CacheState:
    """What a pruned cache remembers of its first `length` tokens (counted before pruning), per segment.

    Attributes:
        length: tokens of the full sequence that the prefixes stand for.
        tail: how many of those at the end were never pruned, so that the cache may be cropped by as many.
        prefixes: per segment, (validity bool [B, kept], whether all of it is valid).
        seen: tokens of the full sequence in the cache, later text included.
        full_since: whether all tokens behind the prefixes are valid.
    """

    length: int
    tail: int
    prefixes: list[tuple[torch.Tensor, bool]]
    seen: int
    full_since: bool = True

    def crop_to(self, seen: int) -> None:
        """Follow a cache that was cropped to `seen` tokens of the full sequence.

        Raises:
            RuntimeError: the crop reaches into the pruned vision tokens.
        """
        removed = self.length - seen
        if removed > self.tail:
            raise RuntimeError(
                f"past_key_values: cropped to {seen} tokens, into the {self.length - self.tail} that hold pruned "
                "vision tokens; start from a fresh cache"
            )
        if removed > 0:
            self.length, self.tail = seen, self.tail - removed
            self.prefixes = [(valid[:, : valid.shape[1] - removed], full) for valid, full in self.prefixes]
        self.seen = seen


@dataclass
class ForwardPass:
    """One forward pass of the text model with vision tokens, or on a cache that holds pruned ones.

    Attributes:
        text_config: the text model's config, from which masks are made.
        segments: one per stretch of layers entered so far; a single one in a pass without vision tokens.
        cache, past: the KV cache, and its length in tokens of the full sequence.
        state: what the cache remembers of earlier prune stages.
        attention_mask: the caller's 2D mask over past and new tokens, or None.
        back: how many tokens the query of the attention row lies in front of a sample's last token.
        importance, residual, short_residual: handed from hook to hook at a prune layer.
        reduced_layers: layers whose vision tokens took fewer experts.
    """

    text_config: PreTrainedConfig
    segments: list[Segment]
    cache: Cache | None
    past: int
    state: CacheState | None
    attention_mask: torch.Tensor | None
    back: int = 0
    importance: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    short_residual: torch.Tensor | None = None
    reduced_layers: int = 0
    _memo: dict = field(default_factory=dict)

    @property
    def has_vision(self) -> bool:
        return self.segments[0].layout is not None

    def segment(self, number: int) -> Segment:
        """The segment of the layers behind `number` prune layers.

        Raises:
            RuntimeError: an earlier prune layer did not run its hooks.
        """
        if not self.has_vision:
            return self.segments[0]
        if number >= len(self.segments):
            raise RuntimeError(NO_EFFECT.format(f"{len(self.segments) - 1} of {number} prune layers"))
        return self.segments[number]

    def is_full(self, number: int) -> bool:
        """Host-known: every key of these layers, cached and new, is valid."""
        full = self.segment(number).is_full
        if self.state is None:
            return full and (self.past == 0 or self.attention_mask is None)
        return full and self.state.prefixes[number][1] and self.state.full_since

    def key_mask(self, number: int, device: torch.device) -> torch.Tensor:
        """bool [B, keys]: which cached and new keys of these layers are valid."""
        new = self.segment(number).valid.to(device)
        if self.state is None:
            if self.past == 0:
                return new
            old = self.attention_mask[:, : self.past] if self.attention_mask is not None else None
            return torch.cat((_valid(old, new, self.past), new), 1)
        between = self.past - self.state.length
        old = None if self.attention_mask is None else self.attention_mask[:, self.state.length : self.past]
        return torch.cat((self.state.prefixes[number][0].to(device), _valid(old, new, between), new), 1)

    def attention_mask_for(self, number: int, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """The mask of a layer behind `number` prune layers, in the form its attention implementation takes."""
        key = ("mask", number, hidden.device)
        if key not in self._memo:
            full = self.is_full(number)
            self._memo[key] = create_causal_mask(
                config=self.text_config,
                inputs_embeds=hidden,
                attention_mask=None if full else self.key_mask(number, hidden.device),
                past_key_values=self.cache,
                layer_idx=layer,
                # that there is padding is known here: transformers would read the device to find out
                allow_is_causal_skip=full,
            )
        return self._memo[key]

    def rope(self, number: int, embeddings: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """RoPE tables [B or 1, n, D] of the survivors, at their original positions."""
        key = ("rope", number, embeddings[0].device)
        if key not in self._memo:
            source = self.segment(number).source.to(embeddings[0].device)
            self._memo[key] = tuple(
                t.expand(source.shape[0], -1, -1).gather(1, source.unsqueeze(-1).expand(-1, -1, t.shape[-1]))
                for t in embeddings
            )
        return self._memo[key]

    def remember(self) -> None:
        """Leave on the cache what later forwards must know, once the last layer has run."""
        if self.cache is None:
            return
        seen = self.past + self.segments[0].valid.shape[1]
        if self.has_vision and (self.state is not None or self.segments[-1].index is not None):
            prefixes = [
                (self.key_mask(number, self.segment(number).valid.device), self.is_full(number))
                for number in range(len(self.segments))
            ]
            setattr(self.cache, CACHE_STATE, CacheState(seen, min(self.segments[0].layout.tails), prefixes, seen))
        elif self.state is not None:
            self.state.seen = seen
            self.state.full_since &= self.segments[0].is_full

    def restore_length(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, n', H] of the last segment -> [B, n, H] of the forward's input, zeros where tokens were dropped."""
        segment = self.segments[-1]
        n = self.segments[0].valid.shape[1]
        full = hidden.new_zeros(hidden.shape[0], n + 1, hidden.shape[2])  # the last row takes the padding
        index = segment.index.to(hidden.device)
        target = torch.where(index >= 0, index, n).unsqueeze(-1).expand_as(hidden)
        return full.scatter_(1, target, hidden)[:, :n]


def _valid(mask: torch.Tensor | None, like: torch.Tensor, length: int) -> torch.Tensor:
    """The caller's validity of cached tokens, bool [B, length]; all valid without a mask."""
    if mask is None:
        return like.new_ones(like.shape[0], length)
    return mask.to(device=like.device, dtype=torch.bool)
