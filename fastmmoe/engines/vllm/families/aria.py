"""Aria, whose gates are bare matrices."""

import torch.nn.functional as F
from vllm.model_executor.models.aria import AriaForConditionalGeneration

from fastmmoe.engines.vllm.model import ReducedModel
from fastmmoe.engines.vllm.prefill import Layers


class ReducedAria(ReducedModel, AriaForConditionalGeneration):
    def text_layers(self) -> Layers:
        return Layers(
            layers=self.language_model.layers,
            norm=self.language_model.norm,
            gate_logits=lambda moe, tokens: F.linear(tokens, moe.router_weight),
        )
