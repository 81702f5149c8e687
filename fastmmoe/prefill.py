"""The state of one forward pass: what each stretch of layers sees of the batch, and what its cache must remember."""

import threading
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function

from fastmmoe.packing import Packing
from fastmmoe_kernels import PrunedBatch, VisionLayout

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
        rope: RoPE tables (cos, sin) [B, n', D] of the survivors, at their original positions; None: the forward's own.
        packing: where these tokens stand in the layers' one row [1, T'], in a packed batch.
    """

    valid: torch.Tensor
    is_full: bool
    layout: VisionLayout | None = None
    index: torch.Tensor | None = None
    merged: torch.Tensor | None = None
    rope: tuple[torch.Tensor, ...] | None = None
    packing: Packing | None = None

    @classmethod
    def from_layout(cls, layout: VisionLayout, packed: bool = False) -> "Segment":
        return cls(layout.valid_mask, layout.is_full, layout, packing=Packing.of(layout) if packed else None)

    @classmethod
    def after(cls, pruned: PrunedBatch, packed: bool = False) -> "Segment":
        """The segment behind a prune stage."""
        packing = Packing.of(pruned.layout) if packed else None
        return cls(
            pruned.valid, pruned.layout.is_full, pruned.layout, pruned.index, pruned.merged, pruned.rope, packing
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens per row, as the layers see them."""
        return tuple(self.valid.shape) if self.packing is None else (1, self.packing.tokens)


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
class Stage:
    """What the hooks of a prune layer hand to one another while a forward runs it and has tokens to prune there.

    Attributes:
        rope: RoPE tables (cos, sin) of the tokens that enter.
        seen: what the pruning took from the layer's attention call; None before it.
        residual, short_residual: the residual stream in front of the MoE, before and after pruning.
    """

    rope: tuple[torch.Tensor, ...]
    seen: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    short_residual: torch.Tensor | None = None


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
        prompt: what the pruning read of the forward's input embeddings.
        stage: the prune layer under way, if it has tokens to prune.
        reduced_layers: layers whose vision tokens took fewer experts.
    """

    text_config: PreTrainedConfig
    segments: list[Segment]
    cache: Cache | None
    past: int
    state: CacheState | None
    attention_mask: torch.Tensor | None
    back: int = 0
    prompt: torch.Tensor | None = None
    stage: Stage | None = None
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

    def token_masks(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(vision tokens, padding or None without any) of the last segment, bool [T] each over all samples' tokens."""
        segment = self.segments[-1]
        key = ("tokens", len(self.segments), device)
        if key not in self._memo:
            vision = segment.layout.vision_mask
            if segment.packing is not None:
                self._memo[key] = segment.packing.pack(vision).flatten().to(device), None
            else:
                padding = None if segment.is_full else ~segment.valid.flatten().to(device)
                self._memo[key] = vision.flatten().to(device), padding
        return self._memo[key]

    def key_count(self, number: int) -> int:
        """How many keys these layers have, cached and new."""
        cached = self.past
        if self.state is not None:
            cached += self.state.prefixes[number][0].shape[1] - self.state.length
        return cached + self.segment(number).valid.shape[1]

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
        packing = self.segment(number).packing
        if key not in self._memo and packing is not None:
            self._memo[key] = None
            # flash attention goes by cu_seq_lens
            if "flash" not in self.text_config._attn_implementation:
                sample = packing.sample.to(hidden.device).unsqueeze(0)
                self._memo[key] = create_causal_mask(
                    config=self.text_config,
                    inputs_embeds=hidden,
                    attention_mask=None,
                    past_key_values=None,
                    and_mask_function=packed_sequence_mask_function(sample),
                    allow_is_causal_skip=False,
                )
        elif key not in self._memo:
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

    def rope(self, number: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """RoPE tables [B, n, D] of the layers behind `number` prune layers."""
        key = ("rope", number, device)
        if key not in self._memo:
            segment = self.segment(number)
            tables = segment.rope if segment.packing is None else map(segment.packing.pack, segment.rope)
            self._memo[key] = tuple(table.to(device) for table in tables)
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
        segment, n = self.segments[-1], self.segments[0].shape[1]
        full = hidden.new_zeros(hidden.shape[0], n + 1, hidden.shape[2])  # the last row takes the padding
        index = segment.index.to(hidden.device)
        if segment.packing is not None:
            row = self.segments[0].packing.row.to(hidden.device)
            index = segment.packing.pack(row.gather(1, index.clamp_min(0)))
        target = torch.where(index >= 0, index, n).unsqueeze(-1).expand_as(hidden)
        return full.scatter_(1, target, hidden)[:, :n]


def _valid(mask: torch.Tensor | None, like: torch.Tensor, length: int) -> torch.Tensor:
    """The caller's validity of cached tokens, bool [B, length]; all valid without a mask."""
    if mask is None:
        return like.new_ones(like.shape[0], length)
    return mask.to(device=like.device, dtype=torch.bool)


class ThreadState(threading.local):
    """What hooks hand to later hooks of the same forward; one per thread, because threads may share a model.

    Attributes:
        vision: vision mask of the forward under way, from the multimodal model to its text model.
        back: how many tokens the asking token lies in front of a sample's last token.
        forward_pass: the text model's forward under way, if FastMMoE has a part in it.
        fixed_layout: the layout that every forward has, see `fastmmoe.fixed_layout`.
    """

    vision: torch.Tensor | None = None
    back: int = 0
    forward_pass: ForwardPass | None = None
    fixed_layout: VisionLayout | None = None
