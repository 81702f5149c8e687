"""The sizes of a text model on which the cost of its prefill depends, layer by layer, read from its config.

Weights and multiply-adds are what FLOPs are counted from, widths what bytes are counted from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from fastmmoe.families.kinds import FULL, RECURRENT, SLIDING, layer_kind
from fastmmoe.families.names import text_config_of

# kinds of layers, beside those whose name ends in "indexed_attention" or "sparse" (an indexer chooses keys)
_ATTENTION = (FULL, SLIDING, "chunked_attention", "reference_sliding_attention", "hybrid", "hybrid_sliding")
# layers that mix no tokens, where attention and MLP are layers of their own
_NO_MIXER = ("moe", "mlp")
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Mixer:
    """How a layer mixes its tokens: attention, linear attention, a state space, a short convolution, or not at all.

    Attributes:
        weights: parameters of its matrices and convolutions, each of which multiplies every token once.
        state: multiply-adds per token on a recurrent state.
        pair: multiply-adds per query and key: heads times the widths of a key and a value.
        window: keys that a query sees, its own included; 0: all in front of it.
        chunk: tokens of a chunk that see nothing outside it; 0: no chunks.
        index_pair: multiply-adds per query and key of an indexer that chooses keys.
        index_pool: tokens that one key of the indexer stands for.
        query, key, value: numbers per token of all queries, keys and values, as they are when they are mixed; of what
            a state space or a short convolution has in their place.
        normed, norms: numbers per token that RMSNorms of attention's own go over, of queries and keys or of what MLA
            writes them out from, and how many norms.
        turned: numbers per token to which attention gives rotary positions.
    """

    weights: int = 0
    state: int = 0
    pair: int = 0
    window: int = 0
    chunk: int = 0
    index_pair: int = 0
    index_pool: int = 1
    query: int = 0
    key: int = 0
    value: int = 0
    normed: int = 0
    norms: int = 0
    turned: int = 0

    @property
    def output(self) -> int:
        """Numbers per token that mixing gives to the last projection."""
        return self.pair - self.query if self.pair else self.value

    def flops(self, tokens: int) -> int:
        """Over one sample's tokens."""
        whole, rest = divmod(tokens, self.chunk or max(tokens, 1))
        squares = whole * self._squares(self.chunk or tokens) + self._squares(rest)
        indexed = tokens * (tokens // self.index_pool)
        return 2 * tokens * (self.weights + self.state) + squares * self.pair + indexed * self.index_pair

    def _squares(self, tokens: int) -> int:
        """Twice the pairs of a query and a key that it sees, less the size of a full window; `tokens**2` without."""
        seen = min(tokens, self.window or tokens)
        return 2 * tokens * seen - seen**2


@dataclass(frozen=True)
class Mlp:
    """What a layer does to each token by itself.

    Attributes:
        weights: parameters that multiply every token: of the gate, shared experts, projections around the experts, or
            of a dense MLP.
        expert: parameters of one expert; 0 without experts.
        width: numbers per token between the matrices of a dense MLP, or of the shared experts.
        expert_width: numbers per token between the matrices of one expert.
        expert_hidden: numbers per token that an expert reads and gives.
    """

    weights: int = 0
    expert: int = 0
    width: int = 0
    expert_width: int = 0
    expert_hidden: int = 0

    def flops(self, tokens: int, active: int) -> int:
        """`active` is the sum over tokens of their experts."""
        return 2 * (tokens * self.weights + active * self.expert)


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
        vision_mlp: of vision tokens, where it is another; None: the same.
    """

    mixer: Mixer = Mixer()
    mlp: Mlp = Mlp()
    vision_mlp: Mlp | None = None

    def flops(
        self, text: Sequence[int], vision: Sequence[int], vision_left: int, text_pairs: int, vision_pairs: int
    ) -> int:
        """Over a batch: tokens per sample; behind the mixer those of all, and their pairs with an expert."""
        vision_mlp = self.vision_mlp or self.mlp
        tokens = self.mlp.flops(sum(text), text_pairs) + vision_mlp.flops(vision_left, vision_pairs)
        return sum(self.mixer.flops(t + v) for t, v in zip(text, vision, strict=True)) + tokens


def no_weights(config: Any, layer: int) -> int:
    return 0


@dataclass(frozen=True)
class Architecture:
    """The sizes of a text model that its prefill's cost depends on.

    Attributes:
        num_experts_per_tok: experts per token, K.
        expert_groups: groups of experts of which a gate chooses the best first; 1: it does not.
    """

    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    layers: tuple[Layer, ...]
    expert_groups: int = 1

    @property
    def num_hidden_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @classmethod
    def from_config(
        cls,
        model_or_config: Any,
        mixer_weights: Callable[[Any, int], int] = no_weights,
        norms_heads: bool = True,
    ) -> "Architecture":
        """Read the sizes from a transformers config (a composite one's text config) or a model.

        Args:
            mixer_weights: (a layer's config, layer) -> parameters in front of its MLP of which no attribute tells.
            norms_heads: attention has norms of its queries and keys, of which no attribute tells either.

        Raises:
            ValueError: no experts, layers of a kind that is not known here, or sizes that make no layers.
        """
        config = text_config_of(model_or_config)
        kind = getattr(config, "model_type", type(config).__name__)
        num_experts, top_k, width = _num_experts(config), _experts_per_token(config), _expert_widths(config)[0]
        if not (num_experts and top_k and width):
            raise ValueError(
                f"text_config: {kind} has no experts known here, expected num_experts, num_experts_per_tok and "
                f"moe_intermediate_size, got {num_experts}, {top_k} and {width}"
            )
        if not (config.hidden_size > 0 and top_k > 0 and 0 < config.num_hidden_layers <= _MOST_LAYERS):
            raise ValueError(
                f"text_config: expected hidden_size and num_experts_per_tok above 0 and 1 to {_MOST_LAYERS} layers, "
                f"got {config.hidden_size}, {top_k} and {config.num_hidden_layers}"
            )
        if top_k > num_experts:
            raise ValueError(f"text_config: {kind} has {top_k} experts per token, expected at most its {num_experts}")
        layers = []
        try:
            dense = dense_layers(config)
            for layer in range(config.num_hidden_layers):
                of_layer = _of_layer(config, layer)
                mixer = _mixer(of_layer, layer, mixer_weights(of_layer, layer), norms_heads)
                layers.append(Layer(mixer, *_mlps(of_layer, layer, layer in dense)))
        except _UnknownKindError as error:
            raise ValueError(f"text_config: {kind} has layers of type {error}, which is not counted") from None
        except (ArithmeticError, LookupError, TypeError) as error:
            raise ValueError(f"text_config: {kind} has sizes that make no layer {len(layers)}: {error}") from error
        for number, layer in enumerate(layers):
            parts = [part for part in (layer.mixer, layer.mlp, layer.vision_mlp) if part is not None]
            if any(size < 0 for part in parts for size in vars(part).values()):
                raise ValueError(f"text_config: {kind} has sizes below 0 in layer {number}: {parts}")
        return cls(config.hidden_size, num_experts, top_k, tuple(layers), _expert_groups(config))

    @classmethod
    def of(
        cls, mixer_weights: Callable[[Any, int], int] = no_weights, norms_heads: bool = True, **sizes: Any
    ) -> "Architecture":
        """Read the sizes from attributes named as in a transformers config."""
        return cls.from_config(SimpleNamespace(**sizes), mixer_weights, norms_heads)


class _UnknownKindError(Exception):
    """A kind of layer that is not known here."""


def dense_layers(config: Any) -> frozenset[int]:
    """Layers without experts, by whichever of the families' conventions the config follows."""
    layers = range(config.num_hidden_layers)
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds:
        return frozenset(i for i in layers if kinds[i] == "dense")
    blocks = getattr(config, "layers_block_type", None)
    if blocks:
        return frozenset(i for i in layers if blocks[i] != "moe")
    with_experts = getattr(config, "moe_layers", None)
    if with_experts:
        return frozenset(layers) - frozenset(with_experts)
    every = _first(config, "decoder_sparse_step", "interleave_moe_layer_step") or 1
    first = _first(config, "first_k_dense_replace", "num_dense_layers") or 0
    named = getattr(config, "mlp_only_layers", None) or ()
    return frozenset(i for i in layers if i < first or i in named or (i + 1) % every != 0)


def gate_weights(config: Any, layer: int) -> int:
    """Parameters of a gate on every element of what a layer's attention gives, if the layer has attention."""
    kind = layer_kind(config, layer)
    if kind in RECURRENT or kind in _NO_MIXER:
        return 0
    return config.hidden_size * _heads(config, kind)[0] * _head_dim(config, kind)


def head_gate_weights(config: Any, layer: int) -> int:
    """Parameters of a gate on what each head gives, if the layer has attention."""
    kind = layer_kind(config, layer)
    return 0 if kind in RECURRENT or kind in _NO_MIXER else config.hidden_size * _heads(config, kind)[0]


# --- what configs call things -----------------------------------------------------------------------------------------


def _first(config: Any, *names: str) -> Any:
    """The first of the attributes that is there and neither None nor 0; else None."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _of_layer(config: Any, layer: int) -> Any:
    """The config of one layer; configs whose layers have sizes of their own tell them only by layer."""
    per_layer = getattr(config, "per_layer_config", None)
    return config if per_layer is None else per_layer[layer]


def _num_experts(config: Any) -> int:
    return _first(config, "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts") or 0


def _experts_per_token(config: Any) -> int:
    return _first(config, "num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k") or 0


def _expert_groups(config: Any) -> int:
    return 1 if getattr(config, "topk_method", None) == "greedy" else _first(config, "n_group") or 1


def _expert_widths(config: Any) -> tuple[int, int]:
    """Widths of an expert of text tokens and of vision tokens."""
    width = _first(config, "moe_intermediate_size", "intermediate_size") or 0
    return (width[0], width[1]) if isinstance(width, (list, tuple)) else (width, width)


def _is_sliding(kind: str) -> bool:
    return kind in (SLIDING, "hybrid_sliding")


def _of_kind(config: Any, kind: str, name: str) -> Any:
    """A size of attention, which sliding layers or full ones may have under a name of their own."""
    own, infix = ("swa", "num_sliding_") if _is_sliding(kind) else ("global", "num_global_")
    return _first(config, f"{own}_{name}", name.replace("num_", infix, 1), name)


def _heads(config: Any, kind: str) -> tuple[int, int]:
    """Heads of queries, and of keys and values."""
    heads = _of_kind(config, kind, "num_attention_heads")
    return heads, _of_kind(config, kind, "num_key_value_heads") or heads


def _head_dim(config: Any, kind: str) -> int:
    return _of_kind(config, kind, "head_dim") or config.hidden_size // config.num_attention_heads


# --- layers -----------------------------------------------------------------------------------------------------------


# of a token's queries, keys and values, all heads together
_Widths = tuple[int, int, int]


def _mixer(config: Any, layer: int, more_weights: int, norms_heads: bool) -> Mixer:
    kind = layer_kind(config, layer)
    if kind in _NO_MIXER:
        return Mixer()
    if kind in RECURRENT:
        weights, state, (query, key, value) = _recurrent(config)
        return Mixer(weights=weights + more_weights, state=state, query=query, key=key, value=value)
    has_indexer = kind.endswith(("indexed_attention", "sparse", "sparse_attention"))
    if kind not in _ATTENTION and not has_indexer:
        raise _UnknownKindError(repr(kind))
    is_latent = bool(getattr(config, "kv_lora_rank", None)) and getattr(config, "use_mla", True)
    weights, pair, widths = _latent_attention(config, kind, layer) if is_latent else _attention(config, kind, layer)
    query, key, value = widths
    window = _first(config, "sliding_window", "sliding_window_size") if _is_sliding(kind) else None
    chunk = _first(config, "attention_chunk_size") if kind == "chunked_attention" else None
    index_weights, index_pair, index_pool = _indexer(config, layer) if has_indexer else (0, 0, 1)
    return Mixer(
        weights=weights + index_weights + more_weights,
        pair=pair,
        window=window or 0,
        chunk=chunk or 0,
        index_pair=index_pair,
        index_pool=index_pool,
        query=query,
        key=key,
        value=value,
        **(_latent_norms(config, kind, layer) if is_latent else _norms(config, layer, query + key, norms_heads)),
    )


def _has_rope(config: Any, layer: int) -> bool:
    told = getattr(config, "no_rope_layers", None)  # 1 where a layer has it, in spite of the name
    return not told or bool(told[layer])


def _norms(config: Any, layer: int, width: int, norms_heads: bool) -> dict[str, int]:
    """What norms and rotary positions of attention go over, of queries and keys of this width."""
    if not _has_rope(config, layer):
        return {}
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor") or _first(config, "partial_rotary_factor") or 1.0
    has_norms = norms_heads and getattr(config, "use_qk_norm", True)
    return {"normed": width if has_norms else 0, "norms": 2 if has_norms else 0, "turned": int(width * share)}


def _latent_norms(config: Any, kind: str, layer: int) -> dict[str, int]:
    """The same of MLA: its latents, each head's rotary part of the query, and the one of the key."""
    latents = [_of_kind(config, kind, "q_lora_rank") or 0]
    latents += [] if _reuses_keys(config, layer) else [_of_kind(config, kind, "kv_lora_rank")]
    turned = (_of_kind(config, kind, "num_attention_heads") + 1) * config.qk_rope_head_dim
    return {
        "normed": sum(latents),
        "norms": sum(map(bool, latents)),
        "turned": turned if _has_rope(config, layer) else 0,
    }


def _reuses_keys(config: Any, layer: int) -> bool:
    """Whether a layer takes the keys and values of an earlier one."""
    modes = getattr(config, "kv_sharing_modes", None)
    return bool(modes) and str(modes[layer]).startswith("reuse")


def _attention(config: Any, kind: str, layer: int) -> tuple[int, int, _Widths]:
    """(parameters, multiply-adds per query and key, widths)."""
    heads, key_heads = _heads(config, kind)
    head_dim = _head_dim(config, kind)
    # keys may serve as values too
    projected = 1 if getattr(config, "attention_k_eq_v", False) and not _is_sliding(kind) else 2
    key_width = 0 if _reuses_keys(config, layer) else projected * key_heads * head_dim
    weights = config.hidden_size * (2 * heads * head_dim + key_width)
    return weights, 2 * heads * head_dim, (heads * head_dim, key_heads * head_dim, key_heads * head_dim)


def _latent_attention(config: Any, kind: str, layer: int) -> tuple[int, int, _Widths]:
    """MLA, every head's keys and values written out."""
    heads = _of_kind(config, kind, "num_attention_heads")
    query_rank, rank = _of_kind(config, kind, "q_lora_rank") or 0, _of_kind(config, kind, "kv_lora_rank")
    value = _of_kind(config, kind, "v_head_dim")
    plain, rotary = _of_kind(config, kind, "qk_nope_head_dim") or 0, config.qk_rope_head_dim
    if not _has_rope(config, layer):
        plain, rotary = plain + rotary, 0
    width = heads * (plain + rotary)
    query = (config.hidden_size + width) * query_rank or config.hidden_size * width
    latent = 0 if _reuses_keys(config, layer) else config.hidden_size * (rank + rotary)
    written_out = rank * heads * (plain + value)
    output = heads * value * config.hidden_size
    return query + latent + written_out + output, width + heads * value, (width, width, heads * value)


def _indexer(config: Any, layer: int) -> tuple[int, int, int]:
    """(parameters, multiply-adds per query and key, tokens per key) of what chooses keys, where it is not shared."""
    heads = _first(config, "index_n_heads", "indexer_n_heads")
    head_dim = _first(config, "index_head_dim", "indexer_head_dim") or 0
    types = getattr(config, "indexer_types", None)
    if not heads or (types and types[layer] == "shared"):
        return 0, 0, 1
    keys = _first(config, "indexer_kv_heads") or 1
    pool = _first(config, "index_kpool", "indexer_compress_ratio") or 1
    query_rank = _first(config, "q_lora_rank") if getattr(config, "kv_lora_rank", None) else None
    weights = (query_rank or config.hidden_size) * heads * head_dim + config.hidden_size * keys * head_dim
    pair = heads * head_dim
    if getattr(config, "index_topk", None):
        # heads are weighed token by token, and keys may be pooled by a gate
        weights += config.hidden_size * (heads + (head_dim if pool > 1 else 0))
        pair += heads
    return weights, pair, pool


def _recurrent(config: Any) -> tuple[int, int, _Widths]:
    """Linear attention, a state space or a short convolution: (parameters, multiply-adds on the state, widths)."""
    hidden = config.hidden_size
    if heads := _first(config, "linear_num_value_heads"):
        # the gated delta rule, with a gate of the output and two numbers per head
        key_width = config.linear_num_key_heads * config.linear_key_head_dim
        width = heads * config.linear_value_head_dim
        convolved = 2 * key_width + width
        weights = hidden * (convolved + width + 2 * heads) + width * hidden
        weights += convolved * config.linear_conv_kernel_dim
        return weights, 3 * width * config.linear_key_head_dim, (key_width, key_width, width)
    if heads := _first(config, "linear_num_heads"):
        # the same rule with a decay per channel, which like the gate is made by two matrices
        head_dim, width = config.linear_head_dim, heads * config.linear_head_dim
        weights = hidden * (3 * width + heads) + width * hidden + 2 * (hidden + width) * head_dim
        weights += 3 * width * config.linear_conv_kernel_dim
        return weights, 3 * width * head_dim, (width, width, width)
    if heads := _first(config, "mamba_num_heads"):
        width = heads * config.mamba_head_dim
        convolved = width + 2 * config.n_groups * config.ssm_state_size
        weights = hidden * (width + convolved + heads) + convolved * config.conv_kernel + width * hidden
        state = config.n_groups * config.ssm_state_size
        return weights, 2 * width * config.ssm_state_size, (state, state, width)
    if kernel := _first(config, "conv_L_cache"):
        return hidden * (3 * hidden + kernel + hidden), 0, (hidden, hidden, hidden)
    raise _UnknownKindError(repr(RECURRENT[0]))


def _mlps(config: Any, layer: int, is_dense: bool) -> tuple[Mlp, Mlp | None]:
    """Of a layer's text tokens, and of its vision tokens where that is another."""
    hidden = config.hidden_size
    blocks = getattr(config, "layers_block_type", None)
    if blocks and blocks[layer] not in _NO_MIXER:
        return Mlp(), None
    matrices = 2 if str(getattr(config, "mlp_hidden_act", "")).startswith("relu") else 3  # a gate makes a third
    dense_width = _first(config, "dense_intermediate_size", "intermediate_size_mlp", "intermediate_size") or 0
    per_layer_input = 2 * hidden * (_first(config, "hidden_size_per_layer_input") or 0)
    if is_dense:
        return Mlp(weights=matrices * hidden * dense_width + per_layer_input, width=dense_width), None
    width = _shared_width(config)
    weights = hidden * _num_experts(config) + matrices * hidden * width + per_layer_input
    if _first(config, "shared_expert_intermediate_size"):
        weights += hidden  # the shared expert's own gate
    if getattr(config, "enable_moe_block", False):
        weights += matrices * hidden * dense_width  # a dense MLP beside the experts
        width += dense_width
    inner = _first(config, "moe_hidden_size", "moe_latent_size")
    if inner:
        weights += 2 * hidden * inner  # into the experts and back
    rows = inner or hidden
    text, vision = (Mlp(weights, matrices * rows * each, width, each, rows) for each in _expert_widths(config))
    return text, (vision if vision != text else None)


def _shared_width(config: Any) -> int:
    """Width of all shared experts together."""
    if getattr(config, "intermediate_size_mlp", None):
        return config.intermediate_size
    count = _first(config, "n_shared_experts", "moe_num_shared_experts") or 0
    each = _first(config, "shared_experts_intermediate_size") or _expert_widths(config)[0]
    together = _first(
        config,
        *("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim"),
        "moe_shared_expert_intermediate_size",
    )
    return together or count * each
