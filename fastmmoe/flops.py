"""Floating-point operations of a language model's prefill, dense and with FastMMoE (method section 3).

The convention: a multiply-add counts 2; attention scores and values count the causal half, `2 n^2 heads head_dim`;
latent attention (MLA) counts as transformers computes it in a prefill, every head's keys and values written out;
norms, activations, rotary embeddings, the language head and FastMMoE's own scoring (one attention row and one gate
pass per prune layer, under 0.1 % of a 30B model's total) are left out, and so is the vision tower. The scoring of the
baselines (rows of attention, SparseVLM's rank and clusters) is left out as well; tokens that they recycle are counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from fastmmoe.config import ReductionConfig, plain_name, text_config_of


@dataclass(frozen=True)
class LayerFlops:
    """One decoder layer; tokens are summed over the batch.

    Attributes:
        layer: counted from 0.
        attention_tokens: tokens the reduced layer's attention sees.
        moe_tokens: tokens its MoE (or dense MLP) sees: fewer than `attention_tokens` where tokens are pruned in front
            of the MoE.
        dense: FLOPs of the unchanged model's layer.
        reduced: FLOPs of the layer under the config.
    """

    layer: int
    attention_tokens: int
    moe_tokens: int
    dense: float
    reduced: float


@dataclass(frozen=True)
class FlopsReport:
    """FLOPs of one prefill of the language model, in FLOPs (not TFLOPs), summed over the batch.

    Attributes:
        dense: the unchanged model's.
        reduced: under the config.
        saved: `1 - reduced / dense`, a fraction.
        per_layer: one entry per decoder layer.
    """

    dense: float
    reduced: float
    saved: float
    per_layer: tuple[LayerFlops, ...]


@dataclass(frozen=True)
class Architecture:
    """The dimensions of a text model that its FLOPs depend on, named as in transformers' configs.

    Attributes:
        intermediate_size: width of the dense MLP of `dense_layers`.
        moe_intermediate_size: width of one expert.
        shared_intermediate_size: width of all shared experts together; 0 without.
        kv_lora_rank: width of MLA's latent; 0 for other attention. With MLA `head_dim` is that of queries and keys,
            `qk_rope_head_dim` the part of it that a key shares with all heads, and values have `v_head_dim`.
        q_lora_rank: width of the queries' latent; 0 without.
        dense_layers: layers with a dense MLP in place of the experts.
    """

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    intermediate_size: int = 0
    shared_intermediate_size: int = 0
    dense_layers: frozenset[int] = frozenset()
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0

    @classmethod
    def from_config(cls, model_or_config: Any) -> "Architecture":
        """Read the dimensions from a transformers config (a composite one's text config) or a model.

        Raises:
            ValueError: no experts, or attention that the convention does not cover (sliding, linear).
        """
        config = text_config_of(model_or_config)
        kind = getattr(config, "model_type", type(config).__name__)
        other = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
        if other:
            raise ValueError(f"text_config: {kind} has layers of type {other}, expected full attention in every layer")
        names = ("num_experts", "n_routed_experts", "num_local_experts")
        num_experts = next((n for name in names if (n := getattr(config, name, None))), 0)
        top_k = getattr(config, "num_experts_per_tok", None)
        width = getattr(config, "moe_intermediate_size", None)
        if not (num_experts and top_k and width):
            raise ValueError(
                f"text_config: {kind} has no experts known here, expected num_experts, num_experts_per_tok and "
                f"moe_intermediate_size, got {num_experts}, {top_k} and {width}"
            )
        shared = getattr(config, "shared_expert_intermediate_size", None) or 0
        shared += (getattr(config, "n_shared_experts", None) or 0) * width
        return cls(
            num_hidden_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=width,
            intermediate_size=getattr(config, "intermediate_size", None) or 0,
            shared_intermediate_size=shared,
            dense_layers=_dense_layers(config),
            **_head_dims(config),
        )

    def attention_flops(self, tokens: int) -> int:
        """Projections, causal scores and values of one layer's attention over one sample's tokens."""
        width = self.num_attention_heads * self.head_dim
        value_width = self.num_attention_heads * (self.v_head_dim or self.head_dim)
        if self.kv_lora_rank:
            query = (self.hidden_size + width) * self.q_lora_rank or self.hidden_size * width
            latent = self.hidden_size * (self.kv_lora_rank + self.qk_rope_head_dim)
            heads = self.kv_lora_rank * (width - self.num_attention_heads * self.qk_rope_head_dim + value_width)
            weights = query + latent + heads
        else:
            weights = self.hidden_size * (width + 2 * self.num_key_value_heads * self.head_dim)
        weights += value_width * self.hidden_size  # output
        return 2 * tokens * weights + tokens**2 * (width + value_width)

    def mlp_flops(self, layer: int, tokens: int, active_experts: int) -> int:
        """The layer's gate and experts, or its dense MLP; `active_experts` is summed over the tokens."""
        swiglu = 6 * self.hidden_size  # three matrices, per token and unit of intermediate width
        if layer in self.dense_layers:
            return swiglu * self.intermediate_size * tokens
        gate = 2 * self.hidden_size * self.num_experts * tokens
        experts = swiglu * self.moe_intermediate_size * active_experts
        return gate + experts + swiglu * self.shared_intermediate_size * tokens


def _head_dims(config: Any) -> dict[str, int]:
    """The dimensions of a head, and those of MLA where a model has it."""
    if not getattr(config, "kv_lora_rank", None) or not getattr(config, "use_mla", True):
        return {"head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads}
    return {
        "head_dim": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "kv_lora_rank": config.kv_lora_rank,
        "q_lora_rank": config.q_lora_rank or 0,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
    }


def _dense_layers(config: Any) -> frozenset[int]:
    """Layers without experts, by whichever of the families' conventions the config follows."""
    layers = range(config.num_hidden_layers)
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds:
        return frozenset(i for i in layers if kinds[i] == "dense")
    step = getattr(config, "decoder_sparse_step", None) or 1
    first = getattr(config, "first_k_dense_replace", None) or 0
    named = getattr(config, "mlp_only_layers", None) or ()
    return frozenset(i for i in layers if i < first or i in named or (i + 1) % step != 0)


_QWEN3_30B_A3B = Architecture(
    num_hidden_layers=48,
    hidden_size=2048,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    intermediate_size=6144,
)

_DEEPSEEK_VL2_TINY = Architecture(
    num_hidden_layers=12,
    hidden_size=1280,
    num_attention_heads=10,
    num_key_value_heads=10,
    head_dim=128,
    num_experts=64,
    num_experts_per_tok=6,
    moe_intermediate_size=896,
    intermediate_size=6848,
    shared_intermediate_size=2 * 896,
    dense_layers=frozenset({0}),
)

_DEEPSEEK_VL2_SMALL = Architecture(
    num_hidden_layers=27,
    hidden_size=2048,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128 + 64,
    num_experts=64,
    num_experts_per_tok=6,
    moe_intermediate_size=1408,
    intermediate_size=10944,
    shared_intermediate_size=2 * 1408,
    dense_layers=frozenset({0}),
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    v_head_dim=128,
)

_DEEPSEEK_VL2 = Architecture(
    num_hidden_layers=30,
    hidden_size=2560,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128 + 64,
    num_experts=72,
    num_experts_per_tok=6,
    moe_intermediate_size=1536,
    intermediate_size=12288,
    shared_intermediate_size=2 * 1536,
    dense_layers=frozenset({0}),
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    v_head_dim=128,
)

# text models by plain name; hub names that start with one are found too, so a name stands in front of its own start
ARCHITECTURES: dict[str, Architecture] = {
    "internvl3.5-30b-a3b": _QWEN3_30B_A3B,
    "qwen3-vl-30b-a3b": _QWEN3_30B_A3B,
    "deepseek-vl2-tiny": _DEEPSEEK_VL2_TINY,
    "deepseek-vl2-small": _DEEPSEEK_VL2_SMALL,
    "deepseek-vl2": _DEEPSEEK_VL2,
}


def flops(
    text_config: Any,
    n_text: int | Sequence[int],
    n_vision: int | Sequence[int],
    config: ReductionConfig,
    *,
    vision_left: Sequence[Sequence[int]] | None = None,
) -> FlopsReport:
    """Count the FLOPs of one prefill of the language model, dense and under `config` (method section 3).

    Args:
        text_config: a transformers config (a composite one's text config is taken) or model, an `Architecture`, or
            the name of one in `ARCHITECTURES` ("internvl3.5-30b-a3b", "OpenGVLab/InternVL3_5-30B-A3B-HF").
        n_text: text tokens of one sample, or of every sample of a batch.
        n_vision: vision tokens, likewise.
        config: what is reduced: a `FastMMoEConfig` or a baseline's.
        vision_left: per prune layer, the vision tokens of each sample behind it, as they were measured; None counts
            them from `config`, which SparseVLM's rank-adaptive counts do not allow.

    Raises:
        TypeError, ValueError: an unknown name or architecture, token counts that are no counts, do not pair up or
            are all zero, or a config that does not fit the model.
    """
    architecture = _architecture(text_config)
    if not isinstance(config, ReductionConfig):
        raise TypeError(f"config: expected a FastMMoEConfig, got {type(config).__name__}")
    top_k = architecture.num_experts_per_tok
    config.check_model(architecture.num_hidden_layers, top_k)
    text, vision = _counts("n_text", n_text), _counts("n_vision", n_vision)
    if len(text) != len(vision):
        raise ValueError(f"n_vision: expected {len(text)} samples like n_text, got {len(vision)}")
    if sum(text) + sum(vision) == 0:
        raise ValueError("n_text and n_vision: expected at least one token, got none")

    def total(layer: int, before: Sequence[int], after: Sequence[int], vision_top_k: int) -> int:
        """FLOPs of a layer; vision tokens per sample before and after the pruning between attention and MoE."""
        return sum(
            architecture.attention_flops(t + b) + architecture.mlp_flops(layer, t + a, t * top_k + a * vision_top_k)
            for t, b, a in zip(text, before, after, strict=True)
        )

    left = _vision_left(config, vision, vision_left)
    per_layer = []
    before = vision
    for layer in range(architecture.num_hidden_layers):
        behind = left.get(layer, before)
        after = before if config.prunes_behind_layer else behind
        is_reduced = config.vision_top_k is not None and layer >= config.reduction_layer
        per_layer.append(
            LayerFlops(
                layer=layer,
                attention_tokens=sum(text) + sum(before),
                moe_tokens=sum(text) + sum(after),
                dense=float(total(layer, vision, vision, top_k)),
                reduced=float(total(layer, before, after, config.vision_top_k if is_reduced else top_k)),
            )
        )
        before = behind
    dense = sum(layer.dense for layer in per_layer)
    reduced = sum(layer.reduced for layer in per_layer)
    return FlopsReport(dense, reduced, 1.0 - reduced / dense, tuple(per_layer))


def _vision_left(
    config: ReductionConfig, vision: tuple[int, ...], measured: Sequence[Sequence[int]] | None
) -> dict[int, tuple[int, ...]]:
    """Prune layer -> vision tokens per sample behind it."""
    if measured is not None:
        stages = [_counts(f"vision_left[{stage}]", counts) for stage, counts in enumerate(measured)]
        if [len(counts) for counts in stages] != [len(vision)] * len(config.prune_layers):
            raise ValueError(
                f"vision_left: expected {len(vision)} counts for each of {len(config.prune_layers)} prune layers, "
                f"got {[len(counts) for counts in stages]}"
            )
        return dict(zip(config.prune_layers, stages, strict=True))
    left = {}
    for stage, layer in enumerate(config.prune_layers):
        vision = left[layer] = tuple(config.vision_left(stage, n) for n in vision)
    return left


def _architecture(text_config: Any) -> Architecture:
    if isinstance(text_config, Architecture):
        return text_config
    if not isinstance(text_config, str):
        return Architecture.from_config(text_config)
    name = plain_name(text_config)
    for known, architecture in ARCHITECTURES.items():
        if name == known or name.startswith(f"{known}-"):
            return architecture
    raise ValueError(f"text_config: unknown name {text_config!r}, expected one of {', '.join(ARCHITECTURES)}")


def _counts(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    counts = tuple(value) if hasattr(value, "__iter__") else (value,)
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, Integral):
            raise TypeError(f"{name}: expected token counts, got {count!r} ({type(count).__name__})")
        if count < 0:
            raise ValueError(f"{name}: expected token counts >= 0, got {count}")
    return tuple(int(count) for count in counts)
