"""The state of one forward pass: what each stretch of layers sees of the batch, and what its cache must remember."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function

from fastmmoe.prefill.cache import CacheState, remember
from fastmmoe.prefill.masks import CallerMask, cut_pairs, visible_pairs
from fastmmoe.prefill.packing import Packing
from fastmmoe_kernels import PrunedBatch, VisionLayout

if TYPE_CHECKING:
    from fastmmoe.prefill.installation import Installation
    from fastmmoe.prefill.plan import Plan

NO_EFFECT = "fastmmoe: no effect: only {} pruned or reduced; something in this model goes past its layers' modules"


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
class Stage:
    """What the modules of a prune layer hand to one another while a forward runs it and has tokens to prune there.

    Attributes:
        number: of the stage, from 0.
        rope: RoPE tables (cos, sin) of the tokens that enter.
        seen: what the pruning took from the layer's attention call; None before it.
        residual: the residual stream in front of the MoE, of the tokens that are left.
        short: the layer's output once tokens are pruned; None before.
    """

    number: int
    rope: tuple[torch.Tensor, ...]
    seen: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    short: torch.Tensor | None = None


@dataclass
class ForwardPass:
    """One forward pass of the text model with vision tokens, or on a cache that holds pruned ones.

    Attributes:
        installation, plan: what runs it, from its first layer to its last.
        text_config: the text model's config, from which masks are made.
        segments: one per stretch of layers entered so far; a single one in a pass without vision tokens.
        cache, past: the KV cache, and its length in tokens of the full sequence.
        state: what the cache remembers of earlier prune stages.
        mask: the caller's.
        back: how many tokens the query of the attention row lies in front of a sample's last token.
        prompt: what the pruning read of the forward's input embeddings.
        stage: the prune layer under way, if it has tokens to prune.
        probing: a gate is asked for its probabilities: it does not choose experts.
        gates, experts: layers whose gate gave vision tokens fewer experts, and whose experts ran on that choice.
    """

    installation: "Installation"
    plan: "Plan"
    text_config: PreTrainedConfig
    segments: list[Segment]
    cache: Cache | None
    past: int
    state: CacheState | None
    mask: CallerMask
    back: int = 0
    prompt: torch.Tensor | None = None
    stage: Stage | None = None
    probing: bool = False
    gates: list[int] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)
    _memo: dict = field(default_factory=dict)

    @property
    def has_vision(self) -> bool:
        return self.segments[0].layout is not None

    @property
    def reduces(self) -> bool:
        """Whether gates give its vision tokens fewer experts."""
        return self.has_vision and not self.probing

    def segment(self, number: int) -> Segment:
        """The segment of the layers behind `number` prune layers.

        Raises:
            RuntimeError: an earlier prune layer did not run.
        """
        if not self.has_vision:
            return self.segments[0]
        if number >= len(self.segments):
            raise RuntimeError(NO_EFFECT.format(f"{len(self.segments) - 1} of {number} prune layers"))
        return self.segments[number]

    def is_full(self, number: int) -> bool:
        """Host-known: every key of these layers, cached and new, is valid, and attention is causal."""
        return self.mask.pairs is None and self._is_all_valid(number)

    def _is_all_valid(self, number: int) -> bool:
        """Host-known: no key of these layers, cached or new, is padding."""
        full = self.segment(number).is_full
        if self.state is not None:
            return full and self.state.prefixes[number][1] and self.state.full_since
        return full and (self.past == 0 or (self.mask.keys is None and self.mask.pairs is None))

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

    def key_tokens(self, number: int, device: torch.device) -> torch.Tensor:
        """int64 [B, keys]: which token of the full sequence each cached and new key of these layers stands for.

        -1 at keys that are not valid.
        """
        segment = self.segment(number)
        valid = segment.valid.to(device)
        batch, n = valid.shape
        place = torch.arange(n, device=device).expand(batch, -1) if segment.index is None else segment.index.to(device)
        parts = [torch.where(valid, place + self.past, -1)]
        begin = 0 if self.state is None else self.state.length
        if self.past > begin:
            between = torch.arange(begin, self.past, device=device).expand(batch, -1)
            if self.mask.keys is not None:
                old = self.mask.keys[:, begin : self.past].to(device=device, dtype=torch.bool)
                between = torch.where(old, between, -1)
            parts.insert(0, between)
        if self.state is not None:
            parts.insert(0, self.state.prefixes[number][0].to(device))
        return torch.cat(parts, 1)

    def key_mask(self, number: int, device: torch.device) -> torch.Tensor:
        """bool [B, keys]: which cached and new keys of these layers are valid."""
        return self.key_tokens(number, device) >= 0

    def visible(self, number: int, device: torch.device) -> torch.Tensor | None:
        """bool [rows, n', keys]: which keys each new token of these layers sees; None: the valid ones up to itself."""
        if self.mask.pairs is None:
            return None
        return visible_pairs(self._cut_pairs(number, device, None))

    def _cut_pairs(self, number: int, device: torch.device, keys: int | None) -> torch.Tensor:
        """The caller's mask of pairs for the tokens of these layers; `keys`: how many attention has, filled or not."""
        segment, pairs = self.segment(number), self.mask.pairs.to(device)
        if segment.packing is not None:
            rows = columns = self._row_tokens(segment, device)
        else:
            n = segment.valid.shape[1]
            rows = torch.arange(n, device=device) if segment.index is None else segment.index.to(device)
            rows = torch.where(segment.valid.to(device), rows, -1)
            columns = self.key_tokens(number, device)
        return cut_pairs(pairs, rows, columns, columns.shape[1] if keys is None else keys)

    def _row_tokens(self, segment: Segment, device: torch.device) -> torch.Tensor:
        """int64 [1, T']: which token of the forward's one row each token of a packed segment's row is."""
        if segment.index is None:
            return torch.arange(segment.packing.tokens, device=device).unsqueeze(0)
        row = self.segments[0].packing.row.to(device)
        return segment.packing.pack(row.gather(1, segment.index.to(device).clamp_min(0)))

    def attention_mask_for(self, number: int, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """The mask of a layer behind `number` prune layers, in the form its attention implementation takes."""
        key = ("mask", number, hidden.device)
        if key not in self._memo:
            self._memo[key] = self._attention_mask(number, layer, hidden)
        return self._memo[key]

    def _attention_mask(self, number: int, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        packing = self.segment(number).packing
        if self.mask.pairs is not None:
            keys = None if self.cache is None else self.cache.get_mask_sizes(hidden.shape[1], layer)[0]
            return self._cut_pairs(number, hidden.device, keys)
        if packing is not None:
            # flash attention goes by cu_seq_lens
            if "flash" in self.text_config._attn_implementation:
                return None
            sample = packing.sample.to(hidden.device).unsqueeze(0)
            return create_causal_mask(
                config=self.text_config,
                inputs_embeds=hidden,
                attention_mask=None,
                past_key_values=None,
                and_mask_function=packed_sequence_mask_function(sample),
                allow_is_causal_skip=False,
            )
        full = self.is_full(number)
        return create_causal_mask(
            config=self.text_config,
            inputs_embeds=hidden,
            attention_mask=None if full else self.key_mask(number, hidden.device),
            past_key_values=self.cache,
            layer_idx=layer,
            # that there is padding is known here: transformers would read the device to find out
            allow_is_causal_skip=full,
        )

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
            config = self.plan.config
            prefixes = [
                (self.key_tokens(number, self.segment(number).valid.device), self._is_all_valid(number))
                for number in range(len(self.segments))
            ]
            tail, packed = min(self.segments[0].layout.tails), self.segments[0].packing is not None
            remember(
                self.cache,
                CacheState(
                    config.prune_layers, config.prunes_behind_layer, seen, tail, prefixes, seen, packed=packed
                ),
            )
        elif self.state is not None:
            self.state.seen = seen
            self.state.full_since &= self.segments[0].is_full

    def restore_length(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, n', H] of the last segment -> [B, n, H] of the forward's input, zeros where tokens were dropped."""
        segment, n = self.segments[-1], self.segments[0].shape[1]
        full = hidden.new_zeros(hidden.shape[0], n + 1, hidden.shape[2])  # the last row takes the padding
        if segment.packing is not None:
            index = self._row_tokens(segment, hidden.device)
        else:
            index = segment.index.to(hidden.device)
        target = torch.where(index >= 0, index, n).unsqueeze(-1).expand_as(hidden)
        return full.scatter_(1, target, hidden)[:, :n]
