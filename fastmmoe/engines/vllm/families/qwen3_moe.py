"""The Qwen3-MoE text model, as several families have it."""

from typing import Any

from torch import nn

from fastmmoe.engines.vllm.prefill import Layers


def qwen3_moe_layers(text_model: nn.Module, text_config: Any) -> Layers:
    return Layers(
        layers=text_model.layers,
        norm=text_model.norm,
        routing={
            "top_k": text_config.num_experts_per_tok,
            "norm_topk_prob": text_config.norm_topk_prob,
            "scoring": "softmax",
        },
    )
