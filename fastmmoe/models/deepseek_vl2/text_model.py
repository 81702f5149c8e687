"""DeepSeek-VL2's language model without its head: transformers' attention and experts, DeepSeek-VL2's router."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3DecoderLayer,
    DeepseekV3Experts,
    DeepseekV3MLP,
    DeepseekV3Model,
    DeepseekV3PreTrainedModel,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
)
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.utils.output_capturing import OutputRecorder

from fastmmoe.models.deepseek_vl2.configuration import DeepseekVLV2TextConfig


class DeepseekVLV2Router(nn.Module):
    """Chooses each token's experts. Experts of groups that were not chosen take part with a score of 0, as officially.

    Attributes:
        weight: [E, H].
        e_score_correction_bias: float32 [E], added to the scores for the choice only; with "noaux_tc", else None.
    """

    def __init__(self, config: DeepseekVLV2TextConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.scoring_func = config.scoring_func
        self.has_bias = config.topk_method == "noaux_tc"
        grouped = config.topk_method != "greedy"
        self.n_group = config.n_group if grouped else 1
        self.topk_group = config.topk_group if grouped else 1
        self.norm_topk_prob = config.norm_topk_prob and self.top_k > 1
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.zeros(self.num_experts, self.hidden_dim))
        self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts) if self.has_bias else None)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logits float32 [T, E], weights float32 [T, K], ids int64 [T, K]) of hidden states [..., H]."""
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        logits = F.linear(hidden_states.float(), self.weight.float())
        scores = logits.softmax(-1) if self.scoring_func == "softmax" else logits.sigmoid()
        choice = scores + self.e_score_correction_bias if self.has_bias else scores
        if self.n_group > 1:
            choice = self._keep_best_groups(choice)
        ids = choice.topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, ids)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * self.routed_scaling_factor, ids

    def _keep_best_groups(self, choice: torch.Tensor) -> torch.Tensor:
        grouped = choice.unflatten(-1, (self.n_group, -1))  # [T, G, E/G]
        worth = grouped.topk(2, dim=-1).values.sum(-1) if self.has_bias else grouped.amax(-1)  # [T, G]
        best = worth.topk(self.topk_group, dim=-1, sorted=False).indices
        kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, best, True)
        return grouped.masked_fill(~kept.unsqueeze(-1), 0.0).flatten(1)


class DeepseekVLV2MoE(nn.Module):
    """Routed experts, plus shared ones that every token uses unweighted."""

    def __init__(self, config: DeepseekVLV2TextConfig):
        super().__init__()
        self.gate = DeepseekVLV2Router(config)
        self.experts = DeepseekV3Experts(config)
        shared = (config.n_shared_experts or 0) * config.moe_intermediate_size
        self.shared_experts = DeepseekV3MLP(config, intermediate_size=shared) if shared else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, n, H] -> [B, n, H]."""
        _, weights, ids = self.gate(hidden_states)
        routed = self.experts(hidden_states.flatten(0, -2), ids, weights).view_as(hidden_states)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden_states)


class DeepseekVLV2DecoderLayer(DeepseekV3DecoderLayer):
    """A pre-norm layer; forward is DeepSeek-V3's."""

    def __init__(self, config: DeepseekVLV2TextConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = (DeepseekV3Attention if config.use_mla else LlamaAttention)(config, layer_idx)
        self.mlp = (DeepseekVLV2MoE if config.mlp_layer_types[layer_idx] == "sparse" else DeepseekV3MLP)(config)
        self.input_layernorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class TakesExpertsImplementation:
    """Lets `experts_implementation` be set: transformers looks for the experts in the source of a model's own module.

    It hands the setting to every part of a model, the vision tower included, and each must take it.
    """

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True


class DeepseekVLV2TextModel(TakesExpertsImplementation, DeepseekV3Model):
    """The decoder; forward is DeepSeek-V3's, with rotary tables made from whatever position ids it gets, gaps included.

    With `config.use_mla` the cache holds latents and rotary keys, else keys and values.
    """

    config: DeepseekVLV2TextConfig
    _no_split_modules = ["DeepseekVLV2DecoderLayer"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # transformers' DeepSeek-V3 keeps whole gates
    _keys_to_ignore_on_load_unexpected = None
    _can_record_outputs = {
        "hidden_states": DeepseekVLV2DecoderLayer,
        "attentions": [OutputRecorder(DeepseekV3Attention, index=1), OutputRecorder(LlamaAttention, index=1)],
        "router_logits": OutputRecorder(DeepseekVLV2Router, index=0),
    }

    def __init__(self, config: DeepseekVLV2TextConfig):
        DeepseekV3PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(DeepseekVLV2DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepseekV3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekVLV2Router):
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.has_bias:
                init.zeros_(module.e_score_correction_bias)
