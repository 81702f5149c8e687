"""The description of a model family: all that the rest of the package knows of one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastmmoe.families.architecture import Architecture
from fastmmoe.families.tiling import Tiling
from fastmmoe_kernels import GateOutput, RoutingOutput


@dataclass(frozen=True)
class Preset:
    """One family's settings in the official scripts, and what it is called by.

    l_v = 2, W = 3, hybrid and mlerp are the same for all, and the config's defaults.

    Attributes:
        supported: for the error that lists what there is.
        names: pattern of the plain names, see `plain_name`.
        model_types: of a composite or of its text config.
        num_experts_per_tok: K, for names; a model or config brings its own.
        prune_layers, alpha, merge_ratio: as in the config.
    """

    supported: str
    names: str
    model_types: tuple[str, ...]
    num_experts_per_tok: int
    prune_layers: tuple[int, ...]
    alpha: float
    merge_ratio: float


@dataclass(frozen=True)
class Family:
    """Where one family keeps the parts that a reduced prefill works on, its preset, its sizes and its pictures.

    Attributes:
        title: what it is called in texts.
        parent_type, text_type: `config.model_type` of the multimodal model and of its text model.
        vision_mask: (the multimodal model, its forward's arguments by name) -> which tokens are vision tokens, bool
            [B, n] on any device, or None if the forward carries no vision features: see `placeholder_mask`.
        routing_options: gate module -> `top_k`, `scoring` and the other options of `topk_routing` that describe it.
        gate_class: name of the gate's class, whose logits are its weight times its input.
        preset: the official settings.
        architectures: the language models by plain name.
        checkpoint: hub id of a released one, for examples.
        load_processor: checkpoint -> its processor, where transformers' own loader asks for too much; or None.
        tilings: (processor, images) -> how the processor cuts each of them; None: not known.
        port: module that registers the model with transformers' Auto classes, where transformers lacks it; or "".
        random_model: module with `random_config`, `random_model`, `random_processor` and `save_random_model`: a small
            model with random weights that needs no download; or "".
        attention, norm, moe, gate, experts: attribute names; the norm's input is the residual stream at the MoE.

    A gate returns (logits, weights, ids).
    """

    title: str
    parent_type: str
    text_type: str
    vision_mask: Callable[[nn.Module, dict[str, Any]], torch.Tensor | None]
    routing_options: Callable[[nn.Module], dict[str, Any]]
    gate_class: str
    preset: Preset
    architectures: Mapping[str, Architecture] = field(default_factory=dict)
    checkpoint: str = ""
    load_processor: Callable[[str], Any] | None = None
    tilings: Callable[[Any, Sequence[Any]], list[Tiling]] | None = None
    port: str = ""
    random_model: str = ""
    attention: str = "self_attn"
    norm: str = "post_attention_layernorm"
    moe: str = "mlp"
    gate: str = "gate"
    experts: str = "experts"

    @property
    def name(self) -> str:
        """Both model types, by which the registry tells families apart."""
        return f"{self.parent_type}+{self.text_type}"

    def is_moe(self, layer: nn.Module) -> bool:
        """Whether a decoder layer holds routed experts (not a dense MLP)."""
        block = getattr(layer, self.moe, None)
        return hasattr(block, self.gate) and hasattr(block, self.experts)

    def attention_of(self, layer: nn.Module) -> nn.Module:
        return getattr(layer, self.attention)

    def norm_of(self, layer: nn.Module) -> nn.Module:
        return getattr(layer, self.norm)

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
        embedding = model.get_input_embeddings()
        # a placeholder may lie behind the vocabulary: then nothing in the embeddings can stand for it
        known = tuple(i for i in ids if i < embedding.num_embeddings)
        if not known:
            raise ValueError(
                f"inputs_embeds: the placeholder tokens {ids} lie outside the embedding table of "
                f"{embedding.num_embeddings}, so vision tokens cannot be found in it; expected input_ids"
            )
        table = embedding(torch.tensor(known, device=embeds.device))
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
