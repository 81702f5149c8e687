"""DeepSeek-VL2's configuration, with the official field names and defaults.

Official `config.json` files hold only what differs from the official classes' defaults, so those are the defaults
here, even where no released checkpoint uses them.
"""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

# all 384 m x 384 n with m n <= 9, as (width, height); of equally good ones the first is taken
CANDIDATE_RESOLUTIONS = tuple(
    (384 * m, 384 * n)
    for m, n in (
        *((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2), (1, 5), (5, 1), (1, 6), (6, 1)),
        *((2, 3), (3, 2), (1, 7), (7, 1), (1, 8), (8, 1), (2, 4), (4, 2), (1, 9), (9, 1), (3, 3)),
    )
)


class DeepseekVLV2VisionConfig(PreTrainedConfig):
    """The SigLIP tower. Also answers to the names that transformers' `SiglipVisionModel` reads.

    Args:
        model_name: a label; it tells DeepSeek-VL2 ("siglip...") from DeepSeek-OCR ("deeplip...").
        width, layers, heads: size of the transformer.
        mlp_ratio: the MLP's width is `int(width * mlp_ratio)`.
        image_size, patch_size: pixels; what is left over at the right and the bottom is not seen.
        global_pool: "map" for the attention pooling head, which checkpoints hold and the model never runs.
    """

    model_type = "vision"
    base_config_key = "vision_config"
    attribute_map = {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads"}

    model_name: str = "siglip_large_patch16_384"
    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float | int = 4
    global_pool: str = "map"

    num_channels: ClassVar[int] = 3
    hidden_act: ClassVar[str] = "gelu_pytorch_tanh"
    layer_norm_eps: ClassVar[float] = 1e-6
    attention_dropout: ClassVar[float] = 0.0

    @property
    def intermediate_size(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def vision_use_head(self) -> bool:
        return self.global_pool == "map"


class DeepseekVLV2ProjectorConfig(PreTrainedConfig):
    """The projector: `downsample_ratio` x `downsample_ratio` patches of `input_dim` features to one of `n_embed`."""

    model_type = "mlp_projector"
    base_config_key = "projector_config"

    projector_type: str = "downsample_mlp_gelu"
    input_dim: int = 1152
    n_embed: int = 2048
    depth: int = 2
    mlp_ratio: int = 1
    downsample_ratio: int = 2
    token_pooling: bool = False


class DeepseekVLV2TextConfig(PreTrainedConfig):
    """The language model: DeepSeek's MoE with either Llama's attention (`use_mla=False`) or latent attention (MLA).

    Args:
        n_routed_experts: None for a model without experts.
        n_shared_experts: experts that every token uses, as one MLP of that many times `moe_intermediate_size`.
        first_k_dense_replace, moe_layer_freq: layer i has experts if i >= first and i is a multiple of freq.
        scoring_func: "softmax" or "sigmoid", how the gate's logits become scores.
        topk_method: "greedy"; "group_limited_greedy" and "noaux_tc" choose `topk_group` of `n_group` groups first, and
            "noaux_tc" adds a bias to the scores for the choice.
        norm_topk_prob: divide the chosen scores by their sum; they are multiplied by `routed_scaling_factor` anyway.
        q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim: MLA's dimensions.

    Raises:
        ValueError: an unknown `scoring_func` or `topk_method`, or groups that do not divide the experts.
    """

    model_type = "deepseek_v2"
    base_config_key = "language_config"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {"num_local_experts": "n_routed_experts", "num_experts": "n_routed_experts"}

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    use_mla: bool = True
    q_lora_rank: int | None = 1536
    kv_lora_rank: int | None = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    scoring_func: str = "softmax"
    topk_method: str = "greedy"
    n_group: int | None = None
    topk_group: int | None = None
    norm_topk_prob: bool = False
    routed_scaling_factor: float | int = 1.0
    output_router_logits: bool = False
    rope_parameters: dict | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    pad_token_id: int | None = None

    rope_interleave: ClassVar[bool] = True  # MLA's; Llama's attention does not read it

    def __post_init__(self, **kwargs: Any):
        if self.use_mla or self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring_func: expected softmax or sigmoid, got {self.scoring_func!r}")
        if self.n_routed_experts is not None:
            self._check_routing()
        super().__post_init__(**kwargs)

    def _check_routing(self) -> None:
        if self.topk_method not in ("greedy", "group_limited_greedy", "noaux_tc"):
            raise ValueError(
                f"topk_method: expected greedy, group_limited_greedy or noaux_tc, got {self.topk_method!r}"
            )
        if self.topk_method == "greedy":
            return
        if not self.n_group or self.n_routed_experts % self.n_group or not self.topk_group:
            raise ValueError(
                f"n_group={self.n_group}, topk_group={self.topk_group}: topk_method {self.topk_method} expects groups "
                f"that divide the {self.n_routed_experts} experts"
            )

    @property
    def head_dim(self) -> int:
        """The part of a head that rotary embeddings turn: all of it without MLA."""
        return self.qk_rope_head_dim if self.use_mla else self.hidden_size // self.num_attention_heads

    @property
    def mlp_layer_types(self) -> list[str]:
        """ "dense" or "sparse" for every layer."""
        return [
            "sparse"
            if self.n_routed_experts is not None and i >= self.first_k_dense_replace and i % self.moe_layer_freq == 0
            else "dense"
            for i in range(self.num_hidden_layers)
        ]


class DeepseekVLV2Config(PreTrainedConfig):
    """DeepSeek-VL2 as a whole. `text_config` is another name of `language_config`.

    Args:
        vision_config, projector_config, language_config: as dicts, config objects, or None for the defaults.
        tile_tag: "2D", the token layout of all released checkpoints.
        global_view_pos: "head" if an image's global view comes in front of its local tiles, else behind them.
        candidate_resolutions: [width, height] that an image may be tiled to, in pixels.

    Raises:
        ValueError: a checkpoint of DeepSeek-OCR, which shares this model type, or a value that has no meaning here.
    """

    model_type = "deepseek_vl_v2"
    attribute_map = {"text_config": "language_config"}
    sub_configs = {
        "vision_config": DeepseekVLV2VisionConfig,
        "projector_config": DeepseekVLV2ProjectorConfig,
        "language_config": DeepseekVLV2TextConfig,
    }

    vision_config: dict | PreTrainedConfig | None = None
    projector_config: dict | PreTrainedConfig | None = None
    language_config: dict | PreTrainedConfig | None = None
    tile_tag: str = "2D"
    global_view_pos: str = "head"
    candidate_resolutions: list | tuple = CANDIDATE_RESOLUTIONS[:1]
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        self._refuse_other_models()
        for name, config_class in self.sub_configs.items():
            given = getattr(self, name)
            if not isinstance(given, PreTrainedConfig):
                setattr(self, name, config_class(**(given or {})))
        if self.tile_tag != "2D":
            raise ValueError(f"tile_tag: expected 2D, got {self.tile_tag!r}")
        self.candidate_resolutions = [list(size) for size in self.candidate_resolutions]
        super().__post_init__(**kwargs)

    def _refuse_other_models(self) -> None:
        """Before the parts are built: DeepSeek-OCR's fields have other types."""
        tower = _field(self.vision_config, "model_name", "siglip")
        projector = _field(self.projector_config, "projector_type", "downsample_mlp_gelu")
        if not tower.startswith("siglip") or projector != "downsample_mlp_gelu":
            raise ValueError(
                f"config: vision tower {tower!r} with projector {projector!r} is not DeepSeek-VL2 (a SigLIP tower with "
                "a downsample_mlp_gelu projector) but a model that shares its model_type, such as DeepSeek-OCR, which "
                "is not supported"
            )


def _field(config: dict | PreTrainedConfig | None, name: str, default: str) -> str:
    if isinstance(config, dict):
        return str(config.get(name, default))
    return getattr(config, name, default)
