"""The description of a model family that the hooks work from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastmmoe_kernels import GateOutput, RoutingOutput


@dataclass(frozen=True)
class Adapter:
    """Where one family keeps the parts that FastMMoE works on.

    Attributes:
        parent_type, text_type: `config.model_type` of the multimodal model and of its text model.
        vision_mask: (the multimodal model, its forward's arguments by name) -> which tokens are vision tokens, bool
            [B, n] on any device, or None if the forward carries no vision features: see `placeholder_mask`.
        routing_options: gate module -> `top_k`, `scoring` and the other options of `topk_routing` that describe it.
        attention, norm, moe, gate, experts: attribute names; the norm's input is the residual stream at the MoE.

    A gate returns (logits, weights, ids).
    """

    parent_type: str
    text_type: str
    vision_mask: Callable[[nn.Module, dict[str, Any]], torch.Tensor | None]
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

    @staticmethod
    def gate_output(logits: torch.Tensor, routing: RoutingOutput | GateOutput) -> tuple:
        """What a gate returns, for a choice of experts."""
        return logits, routing.weights, routing.ids


def placeholder_mask(
    token_ids: Callable[[Any], tuple[int, ...]], features: tuple[str, ...]
) -> Callable[[nn.Module, dict[str, Any]], torch.Tensor | None]:
    """A `vision_mask` for models that put vision features in the place of placeholder tokens.

    Args:
        token_ids: the multimodal model's config -> ids of the placeholder tokens.
        features: forward arguments that carry features. Without one a placeholder id is text: the model may
            generate one.
    """

    def vision_mask(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor | None:
        if not any(_is_given(inputs.get(name)) for name in features):
            return None
        ids = token_ids(model.config)
        if inputs.get("input_ids") is not None:
            return _is_any(inputs["input_ids"], ids)
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            return None
        table = model.get_input_embeddings()(torch.tensor(ids, device=embeds.device))
        return (embeds.unsqueeze(2) == table).all(-1).any(-1)

    return vision_mask


def _is_given(features: Any) -> bool:
    """Whether an argument carries vision features: a tensor, or a dict with at least one."""
    if isinstance(features, dict):
        return any(value is not None for value in features.values())
    return features is not None


def _is_any(input_ids: torch.Tensor, ids: tuple[int, ...]) -> torch.Tensor:
    """bool like input_ids: the token is one of `ids`."""
    mask = input_ids == ids[0]
    for other in ids[1:]:
        mask = mask | (input_ids == other)
    return mask
