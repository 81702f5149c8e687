"""The state of one forward pass: what each stretch of layers sees of the batch, and what its cache must remember."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, packed_sequence_mask_function

from fastmmoe.families.kinds import RECURRENT
from fastmmoe.prefill.cache import CACHE, CacheState, remember
from fastmmoe.prefill.masks import CallerMask, cut_pairs, visible_pairs
from fastmmoe.prefill.packing import Packing
from fastmmoe.prefill.place import Place, Token
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
        packing: where these tokens stand in the layers' one row [1, T'], in a packed batch.
    """

    valid: torch.Tensor
    is_full: bool
    layout: VisionLayout | None = None
    index: torch.Tensor | None = None
    merged: torch.Tensor | None = None
    packing: Packing | None = None

    @classmethod
    def from_layout(cls, layout: VisionLayout, packed: bool = False) -> "Segment":
        return cls(layout.valid_mask, layout.is_full, layout, packing=Packing.of(layout) if packed else None)

    @classmethod
    def after(cls, pruned: PrunedBatch, packed: bool = False) -> "Segment":
        """The segment behind a prune stage."""
        packing = Packing.of(pruned.layout) if packed else None
        return cls(pruned.valid, pruned.layout.is_full, pruned.layout, pruned.index, pruned.merged, packing)

    @property
    def vision_rows(self) -> torch.Tensor | None:
        """bool [rows, tokens per row], vision tokens as the layers see them; None in a forward without."""
        if self.layout is None:
            return None
        return self.layout.vision_mask if self.packing is None else self.packing.pack(self.layout.vision_mask)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens per row, as the layers see them."""
        return tuple(self.valid.shape) if self.packing is None else (1, self.packing.tokens)


@dataclass
class Stage:
    """What the modules of a prune layer hand to one another while a forward runs it and has tokens to prune there.

    Attributes:
        number: of the stage, from 0.
        kind: of the layer's attention.
        per_token: what the layer gets for every token of its input, and what it was cut from.
        seen: what the pruning took from the layer's attention call; None before it.
        residual: the residual stream in front of the MoE, of the tokens that are left.
        short: the layer's output once tokens are pruned; None before.
    """

    number: int
    kind: str
    per_token: list[tuple[Any, Any]]
    seen: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    short: torch.Tensor | None = None


def _is_same(old: Any, new: Any) -> bool:
    """Whether an argument is that of another layer; of tuples, torch.compile tells only their members apart."""
    if isinstance(new, tuple) and isinstance(old, tuple):
        return len(old) == len(new) and all(one is other for one, other in zip(old, new, strict=True))
    return old is new


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
        injected: (bool [B, n], features [V, H] of those tokens per layer), what is added to vision tokens behind the
            first layers; None: nothing. In front of the first prune layer the stock model adds it.
        stage: the prune layer under way, if it has tokens to prune.
        special: bool [B, n], tokens of the forward's rows that are neither text nor vision; None: there are none.
        stock_experts: all tokens take the model's own experts.
        probing: a gate is asked for its probabilities: it does not choose experts.
        token: by which places are marked whose gate and experts ran.
        chosen_at, chosen_ids, num_experts: where a gate last gave tokens fewer experts, which [T, K], and of how many.
            Of other ids that come to the experts, from somebody behind the gate, nothing is known.
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
    injected: tuple[torch.Tensor, list[torch.Tensor]] | None = None
    stage: Stage | None = None
    special: torch.Tensor | None = None
    stock_experts: bool = False
    probing: bool = False
    token: Token = field(default_factory=Token)
    chosen_at: Place | None = None
    chosen_ids: torch.Tensor | None = field(default=None, repr=False)
    num_experts: int = 0
    _memo: dict = field(default_factory=dict)

    @property
    def has_vision(self) -> bool:
        return self.segments[0].layout is not None

    @property
    def reduces(self) -> bool:
        """Whether gates give its tokens fewer experts."""
        if self.probing or self.stock_experts:
            return False
        return self.has_vision or self.plan.config.reduces_text

    def chose(self, place: Place, output: tuple) -> tuple:
        """A gate returns this output (logits [T, E], weights, ids [T, K]): tokens have fewer experts in it."""
        self.chosen_at, self.num_experts, self.chosen_ids = place, output[0].shape[-1], output[2]
        place.gate = self.token
        if place.skips and self.has_vision:
            place.chosen = self.token, output[2]
        return output

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

    def slots(self, number: int, device: torch.device) -> torch.Tensor:
        """int64 [1, n']: place of each new token of these layers among their keys."""
        keys = self.key_count(number)
        return torch.arange(keys - self.segment(number).valid.shape[1], keys, device=device).unsqueeze(0)

    def active_pairs(self, top_k: int, vision_top_k: int) -> int:
        """How many pairs of a token and an expert the last segment has at most, vision tokens taking fewer."""
        layout = self.segments[-1].layout
        if layout is None:
            return self.num_tokens * top_k
        n_vision = sum(layout.n_vision)
        return (sum(layout.lengths) - n_vision) * top_k + n_vision * vision_top_k

    def inject(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Add to what has left a layer [rows, n', H] the features of the vision tokens that are left.

        A merged token takes those of the token it stands at.
        """
        if self.injected is None or not self.plan.first_stage <= layer < len(self.injected[1]):
            return hidden
        number = sum(prune_layer <= layer for prune_layer in self.plan.stages)
        mask, features = self.injected[0].to(hidden.device), self.injected[1][layer].to(hidden.device, hidden.dtype)
        row = mask.flatten().cumsum(0).view_as(mask) - 1  # of the features
        if self.segment(number).index is not None:
            mask = self._gather(mask, number, 1) & (self.row_tokens(number, hidden.device) >= 0)
            row = self._gather(row, number, 1)
        return hidden + features[row.clamp_min(0)].masked_fill(~mask.unsqueeze(-1), 0.0)

    @property
    def num_tokens(self) -> int:
        """Of the last segment, over all rows, padding included."""
        rows, tokens = self.segments[-1].shape
        return rows * tokens

    def token_masks(self, device: torch.device) -> dict[str, torch.Tensor | None]:
        """The masks that `topk_routing` takes of the last segment, bool [T] each over all rows, None without such."""
        segment, number = self.segments[-1], len(self.segments) - 1
        key = ("tokens", number, device)
        if key not in self._memo:
            vision, special = segment.vision_rows, self.special
            if special is not None:
                special = special if segment.index is None else self._gather(special, number, 1)
                special = special.to(device).flatten()
            if vision is not None:
                vision = vision.to(device).flatten()
                special = None if special is None else special & ~vision
            has_padding = segment.packing is None and not segment.is_full
            padding = ~segment.valid.to(device).flatten() if has_padding else None
            self._memo[key] = dict(vision_mask=vision, padding_mask=padding, exempt_mask=special)
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
        """bool [rows, 1, n', keys]: which keys each new token of these layers sees; None: the valid ones up to it."""
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

    def attention_mask_for(self, number: int, kind: str, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """The mask of a layer behind `number` prune layers, in the form its attention takes.

        Args:
            kind: of the layer's attention.
            layer: its number in the cache.
            hidden: [B, n', H], the layer's input.
        """
        key = ("mask", kind, number, hidden.device)
        if key not in self._memo:
            self._memo[key] = self._attention_mask(number, kind, layer, hidden)
        return self._memo[key]

    def _attention_mask(self, number: int, kind: str, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        segment = self.segment(number)
        if kind in RECURRENT:
            # padding must not enter the state
            return None if segment.is_full else segment.valid.to(hidden.device)
        if self.mask.pairs is not None:
            keys = None if self.cache is None else self.cache.get_mask_sizes(hidden.shape[1], layer)[0]
            return self._cut_pairs(number, hidden.device, keys)
        make = self.installation.family.masks.get(kind) or LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind]
        options: dict = {"config": self.text_config, "inputs_embeds": hidden}
        if segment.packing is not None:
            # flash attention goes by cu_seq_lens
            if "flash" in self.text_config._attn_implementation:
                return None
            sample = segment.packing.sample.to(hidden.device).unsqueeze(0)
            options |= {"attention_mask": None, CACHE: None, "allow_is_causal_skip": False}
            options["and_mask_function"] = packed_sequence_mask_function(sample)
        else:
            # that there is padding is known here: transformers would read the device to find out
            full = self.is_full(number)
            options["attention_mask"] = None if full else self.key_mask(number, hidden.device)
            options |= {CACHE: self.cache, "layer_idx": layer, "allow_is_causal_skip": full}
        return make(**(options | getattr(make, "keywords", {})))

    def gathered(self, name: str, kind: str, number: int, value: Any, dim: int = 1) -> Any:
        """What layers of a kind, behind `number` prune layers, get of an argument of the forward's tokens.

        Args:
            name: the argument.
            value: a tensor with the tokens at `dim` (negative ones count from the end), or a tree of them; others stay
                what they are.
        """
        known = self._memo.get((name, kind, number))
        # the layers of a kind are handed the same, until they are on another device
        if known is None or not _is_same(known[0], value):
            leaves, tree = tree_flatten(value)
            cut = [self._gather(leaf, number, dim) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            known = self._memo[(name, kind, number)] = value, tree_unflatten(cut, tree)
        return known[1]

    def _gather(self, tensor: torch.Tensor, number: int, dim: int) -> torch.Tensor:
        """A tensor of the forward's tokens -> of those of a segment; padding holds some token's values."""
        index = self.row_tokens(number, tensor.device).clamp_min(0)  # [B, n']
        dim %= tensor.dim()
        if dim == 0:
            return tensor[index[0]]
        # rows of samples stand right in front of the tokens, or there is one row for all
        rows = tensor.expand(*tensor.shape[: dim - 1], index.shape[0], *tensor.shape[dim:])
        at = index.view(*(1,) * (dim - 1), *index.shape, *(1,) * (tensor.dim() - dim - 1))
        return rows.gather(dim, at.expand(*rows.shape[:dim], index.shape[1], *rows.shape[dim + 1 :]))

    def row_tokens(self, number: int, device: torch.device) -> torch.Tensor:
        """int64 [rows, n']: which token of the forward's rows each token of these layers' rows is; -1 at padding."""
        segment = self.segment(number)
        if segment.packing is not None:
            return self._row_tokens(segment, device)
        return segment.index.to(device)

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
                CacheState(config.prune_layers, config.prunes_behind_layer, seen, tail, prefixes, seen, packed=packed),
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
