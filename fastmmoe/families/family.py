"""The description of a model family: all that the rest of the package knows of one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import nn

from fastmmoe.families.architecture import Architecture, dense_layers, no_weights
from fastmmoe.families.kinds import layer_kind
from fastmmoe.families.tiling import Tiling
from fastmmoe_kernels import GateOutput, RoutingOutput


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One family's settings, and what it is called by.

    l_v = 2, W = 3, hybrid and mlerp are the same for all, and the config's defaults.

    Attributes:
        supported: for the error that lists what there is.
        names: pattern of the plain names, see `plain_name`.
        num_experts_per_tok: K, for names; a model or config brings its own.
        prune_layers, alpha, merge_ratio: as in the config.
        official: the settings are those of the official scripts. Else they are ours: the prune layers stand at the same
            shares of the depth, and a model or config of another depth has others.
    """

    supported: str
    names: str
    num_experts_per_tok: int
    prune_layers: tuple[int, ...]
    alpha: float = 0.5
    merge_ratio: float = 0.025
    official: bool = False


# of the depth, at which the official scripts prune 48 layers
PRUNE_SHARES = (5 / 48, 8 / 48, 12 / 48)


# attributes of composite configs that hold ids of placeholder tokens, and arguments that carry their features
IMAGE_IDS = ("image_token_id", "image_token_index")
PLACEHOLDERS = (*IMAGE_IDS, "video_token_id", "video_token_index")
FEATURES = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")


def _linear(gate: nn.Module) -> dict[str, Any]:
    return {}


def _no_arguments(moe: nn.Module) -> tuple:
    return ()


def _first(output: tuple) -> torch.Tensor:
    return output[0]


def _logits_weights_ids(gate: nn.Module, logits: torch.Tensor, routing: RoutingOutput | GateOutput) -> tuple:
    return logits, routing.weights, routing.ids


def _sum(layer: nn.Module, residual: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return residual + output


def _none(*_: Any) -> str:
    return ""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where one family keeps the parts that a reduced prefill works on, its preset, its sizes and its pictures.

    A family is a text model under a multimodal one. Other multimodal models with the same text model are described by
    `under`.

    Attributes:
        title: what it is called in texts.
        parent_type, text_type: `config.model_type` of the multimodal model and of its text model.
        obstacle: why the family is not supported at all; "" where it is.

    Of the multimodal model:
        placeholders: attributes of its config with the ids of the tokens that vision features take the place of; what
            a config lacks or leaves None is skipped.
        features: arguments of its forward that carry features. Without one a placeholder id is text: the model may
            generate one.
        videos: whether it takes them.
        vision_mask: (model, its forward's arguments by name) -> which tokens are vision tokens, bool [B, n] on any
            device, or None if the forward carries no vision features; None: those at the placeholders.
        checkpoint: hub id of a released one, for examples.
        preset: the settings.
        architectures: the language models by plain name.
        load_processor: checkpoint -> its processor, where transformers' own loader asks for too much; or None.
        tilings: (the multimodal model's config, processor, images, the inputs it made of them) -> where each image's
            vision tokens lie; None: not known, or nowhere.
        port: module that registers the model with transformers' Auto classes, where transformers lacks it; or "".
        random_model: module with `random_config`, `random_model`, `random_processor` and `save_random_model`: a small
            model with random weights that needs no download; or "".

    Of the text model:
        mixer_weights: (a layer's config, layer) -> parameters of matrices and convolutions in front of its MLP of which
            no attribute of the config tells: gates of attention, connections of residual streams.
        norms_heads: attention, where it is not MLA, has norms of its queries and keys.
        attention, norm, moe, gate, experts: where a decoder layer keeps them, as for `get_submodule`; the gate's and
            the experts' are counted from the MoE. The norm's input is the residual stream at the MoE. `moe` "" is the
            layer itself.
        vision_only: the gate and the experts see vision tokens alone: text tokens have others.
        routing_options: (gate, what else it is called with) -> `top_k`, `scoring` and the other options of
            `topk_routing` that describe it.
        gate_class: name of the gate's class.
        gate_arguments: MoE -> what it calls its gate with beside the tokens.
        linear: gate -> options of `gate_routing` beside its weight, under which that computes the gate's logits; None:
            they are no linear function of its input.
        logits: a gate's output -> its logits, floating [T, E].
        gate_output: (gate, logits, a choice of experts) -> what the gate returns for it.
        plain_experts: class of experts outside of transformers' experts interface that follow its layout; or "".
        top_k: attribute of the text config with K, the experts per token.
        own_experts: `moe_experts` does not know them: the model's own run, on one row per token and active expert.
        expert_obstacle: text config -> why vision tokens cannot take fewer experts; "" where they can.
        prunable_kinds: kinds of attention (`config.layer_types`) under which a token's last query sees every token in
            front of it that could matter, so that its attention ranks them.
        prune_obstacle: (text config, layer) -> why pruning in front of this layer's MoE is unsound though its kind of
            attention allows it; "" where it is sound.
        per_token: a layer's arguments, floating or int [B, n, ...], that are cut like its tokens.
        positions: what becomes of a layer's `position_ids` behind a prune layer, where position encodings are applied
            already: "none"; "source", the tokens' original ones; "slot", their places among the tokens that are left.
        injected: the text model's arguments with the mask and the list of features that it adds to vision tokens
            behind its first layers; None: it does not.
        hidden_states_obstacle: why its layers' hidden states, shorter behind a prune layer, must not be had; or "".
        shorten_cache: (a layer's part of the cache, how many tokens of a prompt it will not get) -> tells it, in front
            of the layer, where `generate` has told it how many to expect.
        rows_by: dimensions of the position ids by which the model's own masks keep samples in one row apart.
        masks: kind of attention -> function that makes its mask, for kinds that transformers' own table lacks.
        combine: (layer, residual, output of its MoE) -> the layer's output, all [B, n, H].
    """

    title: str
    parent_type: str
    text_type: str
    obstacle: str = ""

    placeholders: tuple[str, ...] = PLACEHOLDERS
    features: tuple[str, ...] = FEATURES
    videos: bool = False
    vision_mask: Callable[[nn.Module, dict[str, Any]], torch.Tensor | None] | None = None
    checkpoint: str = ""
    preset: Preset | None = None
    architectures: Mapping[str, Architecture] = field(default_factory=dict)
    load_processor: Callable[[str], Any] | None = None
    tilings: Callable[[Any, Any, Sequence[Any], Mapping[str, Any]], list[Tiling]] | None = None
    port: str = ""
    random_model: str = ""

    mixer_weights: Callable[[Any, int], int] = no_weights
    norms_heads: bool = True
    attention: str = "self_attn"
    norm: str = "post_attention_layernorm"
    moe: str = "mlp"
    gate: str = "gate"
    experts: str = "experts"
    vision_only: bool = False
    routing_options: Callable[..., dict[str, Any]] | None = None
    gate_class: str = ""
    gate_arguments: Callable[[nn.Module], tuple] = _no_arguments
    linear: Callable[[nn.Module], dict[str, Any]] | None = _linear
    logits: Callable[[tuple], torch.Tensor] = _first
    gate_output: Callable[[nn.Module, torch.Tensor, RoutingOutput | GateOutput], tuple] = _logits_weights_ids
    plain_experts: str = ""
    own_experts: bool = False
    expert_obstacle: Callable[[Any], str] = _none
    top_k: str = "num_experts_per_tok"
    prunable_kinds: tuple[str, ...] = ("full_attention",)
    prune_obstacle: Callable[[Any, int], str] = _none
    per_token: tuple[str, ...] = ()
    positions: str = "none"
    injected: tuple[str, str] | None = None
    hidden_states_obstacle: str = ""
    shorten_cache: Callable[[Any, int], Any] = _none
    rows_by: tuple[int, ...] = (2, 3)
    masks: Mapping[str, Callable[..., torch.Tensor | None]] = field(default_factory=dict)
    combine: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor] = _sum

    @property
    def name(self) -> str:
        """Both model types, by which the registry tells families apart."""
        return f"{self.parent_type}+{self.text_type}"

    def under(self, parent_type: str) -> "Family":
        """The same text model under another multimodal model of transformers, whose vision tokens are placeholders."""
        return replace(
            self,
            title=f"{parent_type} with {self.text_type}",
            parent_type=parent_type,
            placeholders=PLACEHOLDERS,
            features=FEATURES,
            videos=False,
            vision_mask=None,
            checkpoint="",
            preset=None if self.preset is None else replace(self.preset, official=False),
            load_processor=None,
            tilings=None,
            port="",
            random_model="",
        )

    def find_vision(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Which tokens of a multimodal model's forward, given its arguments by name, are vision tokens.

        Returns:
            bool [B, n] on any device, or None if the forward carries no vision features.
        """
        if self.vision_mask is not None:
            return self.vision_mask(model, inputs)
        ids = tuple(i for name in self.placeholders if (i := getattr(model.config, name, None)) is not None)
        return placeholder_mask(model, inputs, ids, self.features)

    def why_not_prune(self, text_config: Any, layer: int) -> str:
        """Why pruning in front of a layer's MoE is unsound; "" where it is sound."""
        kind, obstacle = layer_kind(text_config, layer), self.prune_obstacle(text_config, layer)
        if not obstacle and kind not in self.prunable_kinds:
            return f"its attention is of kind {kind!r}, whose last query does not rank all vision tokens"
        return obstacle

    def preset_layers(self, text_config: Any) -> tuple[int, ...]:
        """Where a preset of ours prunes a model: the first sound layers at or behind the shares of its depth."""
        depth = text_config.num_hidden_layers
        moe = sorted(set(range(depth)) - dense_layers(text_config))
        sound = [layer for layer in moe if not self.why_not_prune(text_config, layer)]
        chosen: list[int] = []
        for share in PRUNE_SHARES:
            wanted = max(round(share * depth), chosen[-1] + 1 if chosen else 0)
            chosen += [layer for layer in sound if layer >= wanted][:1]
        return tuple(chosen)

    def is_moe(self, layer: nn.Module) -> bool:
        """Whether a decoder layer holds routed experts (not a dense MLP)."""
        block = _at(layer, self.moe)
        return block is not None and None not in (_at(block, self.gate), _at(block, self.experts))

    def attention_of(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule(self.attention)

    def norm_of(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule(self.norm)

    def moe_of(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule(self.moe)

    def gate_of(self, layer: nn.Module) -> nn.Module:
        return self.moe_of(layer).get_submodule(self.gate)

    def experts_of(self, layer: nn.Module) -> nn.Module:
        return self.moe_of(layer).get_submodule(self.experts)


def _at(module: nn.Module, path: str) -> nn.Module | None:
    """A module inside another, if there is one."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def placeholder_mask(
    model: nn.Module, inputs: dict[str, Any], ids: tuple[int, ...], features: tuple[str, ...]
) -> torch.Tensor | None:
    """Where placeholder tokens stand in a multimodal model's forward, bool [B, n]; None without features.

    Args:
        inputs: the forward's arguments by name.
        ids: of the placeholder tokens.
        features: arguments of which one at least must be given.
    """
    if not any(_is_given(inputs.get(name)) for name in features):
        return None
    if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is not None:
        # a placeholder may lie behind the vocabulary: then nothing in the embeddings can stand for it
        size = model.get_input_embeddings().num_embeddings
        if min(ids) >= size:
            raise ValueError(
                f"inputs_embeds: the placeholder tokens {ids} lie outside the embedding table of {size}, so vision "
                "tokens cannot be found in it; expected input_ids"
            )
    return find_tokens(model, inputs, ids)


def find_tokens(model: nn.Module, inputs: dict[str, Any], ids: tuple[int, ...]) -> torch.Tensor | None:
    """Where tokens of some ids stand among a forward's input, by ids or by embeddings, bool [B, n]; None without."""
    if inputs.get("input_ids") is not None:
        return _is_any(inputs["input_ids"], ids)
    embeds = inputs.get("inputs_embeds")
    if embeds is None:
        return None
    embedding = model.get_input_embeddings()
    known = tuple(i for i in ids if i < embedding.num_embeddings)
    table = embedding(torch.tensor(known, device=embeds.device))
    return (embeds.unsqueeze(2) == table).all(-1).any(-1)


def _is_given(features: Any) -> bool:
    """Whether an argument carries vision features: a tensor, or a dict with at least one."""
    if isinstance(features, dict):
        return any(value is not None for value in features.values())
    return features is not None


def _is_any(input_ids: torch.Tensor, ids: tuple[int, ...]) -> torch.Tensor:
    """bool like input_ids: the token is one of `ids`."""
    # no tensor of ids: to copy one waits, in every step of decoding
    found = [(input_ids >= low) & (input_ids <= high) if low < high else input_ids == low for low, high in _ranges(ids)]
    return reduce(torch.bitwise_or, found)


@lru_cache(maxsize=64)
def _ranges(ids: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The first and the last of each stretch of consecutive ids: special tokens are often one."""
    ranges: list[list[int]] = []
    for number in sorted(set(ids)):
        if ranges and ranges[-1][1] + 1 == number:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return tuple((low, high) for low, high in ranges)
