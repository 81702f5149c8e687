"""Which tokens every layer of a prefill sees: what FLOPs and times are counted from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from fastmmoe.config import ReductionConfig
from fastmmoe.families import ARCHITECTURES, Architecture, architecture_of, expert_obstacle, plain_name


@dataclass(frozen=True)
class LayerTokens:
    """The vision tokens of one reduced decoder layer, per sample.

    Attributes:
        layer: counted from 0.
        before: those that its attention sees.
        after: those that its MoE (or dense MLP) sees: fewer where tokens are pruned in front of the MoE.
        text_pairs, vision_pairs: pairs of a token and an expert, over the whole batch.
        vision_experts: how many different experts vision tokens share at most; None: as many as they choose.
        prunes: whether it is a prune layer.
    """

    layer: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    text_pairs: int
    vision_pairs: int
    vision_experts: int | None
    prunes: bool


@dataclass(frozen=True)
class PrefillTokens:
    """A checked question about a prefill: the model's sizes, tokens per sample, and what each layer sees of them."""

    architecture: Architecture
    text: tuple[int, ...]
    vision: tuple[int, ...]
    layers: tuple[LayerTokens, ...]


def count_tokens(
    text_config: Any,
    n_text: int | Sequence[int],
    n_vision: int | Sequence[int],
    config: ReductionConfig,
    vision_left: Sequence[Sequence[int]] | None = None,
    expert_pairs: Mapping[int, tuple[int, int]] | None = None,
) -> PrefillTokens:
    """Tokens per layer; arguments and errors are those of `fastmmoe.flops`."""
    architecture, obstacle = _sizes(text_config)
    if not isinstance(config, ReductionConfig):
        raise TypeError(f"config: expected a FastMMoEConfig, got {type(config).__name__}")
    if config.reduces_experts and obstacle:
        raise ValueError(f"config: this model's vision tokens cannot take fewer experts: {obstacle}")
    top_k = architecture.num_experts_per_tok
    config.check_model(architecture.num_hidden_layers, top_k)
    choices = [config.expert_choice(layer, top_k) for layer in range(architecture.num_hidden_layers)]
    for choice in choices:
        if choice is not None:
            choice.check_experts(architecture.num_experts, architecture.expert_groups, "this model")
    text, vision = _counts("n_text", n_text), _counts("n_vision", n_vision)
    if len(text) != len(vision):
        raise ValueError(f"n_vision: expected {len(text)} samples like n_text, got {len(vision)}")
    if sum(text) + sum(vision) == 0:
        raise ValueError("n_text and n_vision: expected at least one token, got none")
    # the stock model runs
    is_skipped = vision_left is None and 0 < sum(vision) < config.min_vision_tokens
    left = {} if is_skipped else _vision_left(config, vision, vision_left)
    layers = []
    before = vision
    for layer in range(architecture.num_hidden_layers):
        behind = left.get(layer, before)
        after = before if config.prunes_behind_layer else behind
        choice = None if is_skipped else choices[layer]
        most = sum(text) * top_k, sum(after) * (top_k if choice is None else choice.vision_top_k)
        text_pairs, vision_pairs = _pairs(layer, (expert_pairs or {}).get(layer, most), most)
        budget = None if choice is None else choice.budget
        layers.append(LayerTokens(layer, before, after, text_pairs, vision_pairs, budget, prunes=layer in left))
        before = behind
    return PrefillTokens(architecture, text, vision, tuple(layers))


def _pairs(layer: int, pairs: Sequence[int], most: tuple[int, int]) -> tuple[int, ...]:
    name = f"expert_pairs[{layer}]"
    counts = _counts(name, pairs)
    if len(counts) != 2 or any(count > bound for count, bound in zip(counts, most, strict=True)):
        raise ValueError(f"{name}: expected pairs of text and of vision tokens, at most {most}, got {pairs}")
    return counts


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


def _sizes(text_config: Any) -> tuple[Architecture, str]:
    """The sizes, and why vision tokens cannot take fewer experts, or ""."""
    if isinstance(text_config, Architecture):
        return text_config, ""
    if not isinstance(text_config, str):
        return architecture_of(text_config), expert_obstacle(text_config)
    name = plain_name(text_config)
    for known, architecture in ARCHITECTURES.items():
        if name == known or name.startswith(f"{known}-"):
            return architecture, expert_obstacle(known)
    raise ValueError(f"text_config: unknown name {text_config!r}, expected one of {', '.join(ARCHITECTURES)}")


def _counts(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    counts = tuple(value) if hasattr(value, "__iter__") else (value,)
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, Integral):
            raise TypeError(f"{name}: expected token counts, got {count!r} ({type(count).__name__})")
        if count < 0:
            raise ValueError(f"{name}: expected token counts >= 0, got {count}")
    return tuple(int(count) for count in counts)
