"""The description of a model family that the hooks work from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastmmoe_kernels import RoutingOutput


@dataclass(frozen=True)
class Adapter:
    """Where one family keeps the parts that FastMMoE works on.

    Attributes:
        parent_type, text_type: `config.model_type` of the multimodal model and of its text model.
        vision_token_ids: the multimodal model's config -> ids of its placeholder tokens for vision features.
        vision_inputs: forward arguments that carry vision features; without one, no token is a vision token.
        scoring: how the gate turns logits into probabilities, "softmax" or "sigmoid".
        routing_options: gate module -> `top_k` and the other options of `topk_routing` that describe it.
        attention, norm, moe, gate, experts: attribute names; the norm's input is the residual stream at the MoE.

    A gate returns (logits, weights, ids).
    """

    parent_type: str
    text_type: str
    vision_token_ids: Callable[[Any], tuple[int, ...]]
    vision_inputs: tuple[str, ...]
    scoring: str
    routing_options: Callable[[nn.Module], dict[str, Any]]
    attention: str = "self_attn"
    norm: str = "post_attention_layernorm"
    moe: str = "mlp"
    gate: str = "gate"
    experts: str = "experts"

    def is_moe(self, layer: nn.Module) -> bool:
        """Whether a decoder layer holds routed experts (not a dense MLP)."""
        block = getattr(layer, self.moe, None)
        return hasattr(block, self.gate) and hasattr(block, self.experts)

    def moe_of(self, layer: nn.Module) -> nn.Module:
        return getattr(layer, self.moe)

    def gate_of(self, layer: nn.Module) -> nn.Module:
        return getattr(self.moe_of(layer), self.gate)

    def experts_of(self, layer: nn.Module) -> nn.Module:
        return getattr(self.moe_of(layer), self.experts)

    def gate_probs(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The gate's probabilities, float32 [..., E], for hidden [..., H]."""
        # forward, not __call__: neither our own hook nor output recorders should see this extra pass
        logits = self.gate_of(layer).forward(hidden.reshape(-1, hidden.shape[-1]))[0].float()
        probs = logits.softmax(-1) if self.scoring == "softmax" else logits.sigmoid()
        return probs.view(*hidden.shape[:-1], -1)

    @staticmethod
    def rerouted(gate_output: tuple, routing: RoutingOutput) -> tuple:
        """The gate's output with another choice of experts."""
        return gate_output[0], routing.weights, routing.ids
