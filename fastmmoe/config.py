"""What is done to a prefill: the base of every method's frozen, validated description."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, ClassVar, Self

from fastmmoe_kernels.layout import prune_plan

BACKENDS = ("auto", "triton", "torch")


@dataclass(frozen=True)
class ExpertChoice:
    """How the tokens of a layer choose experts, where that is not the model's own way.

    Attributes:
        vision_top_k: the most experts of a vision token.
        skip_below: the least weights of text and of vision tokens, as in `topk_routing`; None: all chosen experts run.
        budget: how many different experts the vision tokens of a forward share; None: as many as they choose.
    """

    vision_top_k: int
    skip_below: tuple[float, float] | None = None
    budget: int | None = None

    def check_experts(self, num_experts: int, groups: int, title: str) -> None:
        """Check that a layer of so many experts can be routed so.

        Args:
            groups: of experts, the best of which the gate chooses first; 1: none.
            title: whose gate that is.

        Raises:
            ValueError: a budget that all experts fit into, or of a gate that chooses by groups.
        """
        if self.budget is not None and groups > 1:
            raise ValueError(f"expert_budget: not supported with {title}'s gate, which chooses by groups")
        if self.budget is not None and self.budget >= num_experts:
            raise ValueError(f"expert_budget={self.budget}: expected fewer than the model's {num_experts} experts")


class ReductionConfig:
    """Base of every config that `fastmmoe.enable` and `fastmmoe.flops` take: checks, the fit to a model, JSON.

    A subclass is a frozen dataclass. It has the fields `vision_top_k`, `reduction_layer`, `backend` and
    `min_vision_tokens`, and `prune_layers` as a field or a property. A field is checked by what `checked` gave it, or
    else by the entry of its name in `CHECKS`.

    Attributes:
        prunes_behind_layer: a prune layer's output is shortened; else the input of its MoE.
        special_tokens: ids of tokens that are neither text nor vision where text tokens take fewer experts.
    """

    prunes_behind_layer: ClassVar[bool] = False
    special_tokens: ClassVar[tuple[int, ...]] = ()

    @property
    def reduces_experts(self) -> bool:
        """Whether any token may take fewer experts."""
        return self.vision_top_k is not None

    @property
    def reduces_text(self) -> bool:
        """Whether text tokens may, so that decoding is reduced as well."""
        return False

    def expert_choice(self, layer: int, top_k: int) -> ExpertChoice | None:
        """How the tokens of a MoE layer choose experts; None: as the model does, `top_k` per token."""
        if self.vision_top_k is None or self.vision_top_k >= top_k or layer < self.reduction_layer:
            return None
        return ExpertChoice(self.vision_top_k)

    def __post_init__(self) -> None:
        for own in dataclasses.fields(self):
            check = own.metadata.get("check") or CHECKS[own.name]
            object.__setattr__(self, own.name, check(own.name, getattr(self, own.name)))

    def vision_left(self, stage: int, n_vision: int) -> int:
        """Vision tokens of one sample that leave a stage (counted from 0) which `n_vision` enter."""
        raise NotImplementedError

    def pruning(self) -> Any:
        """The method's way of pruning, a `fastmmoe.methods.method.Pruning`."""
        raise NotImplementedError

    def check_model(self, num_hidden_layers: int, num_experts_per_tok: int) -> None:
        """Check that a text model with so many layers and experts per token can be run with this config.

        Raises:
            ValueError: a prune layer or `reduction_layer` beyond the last layer, or `vision_top_k` above K.
        """
        layers = f"the model has {num_hidden_layers} layers, expected layers from 0 to {num_hidden_layers - 1}"
        if self.prune_layers and self.prune_layers[-1] >= num_hidden_layers:
            raise ValueError(f"prune_layers={self.prune_layers}: {layers}; give prune_layers that fit this model")
        if self.vision_top_k is None:
            return
        if self.vision_top_k > num_experts_per_tok:
            raise ValueError(f"vision_top_k={self.vision_top_k}: expected at most the model's {num_experts_per_tok}")
        if self.vision_top_k < num_experts_per_tok and self.reduction_layer >= num_hidden_layers:
            raise ValueError(
                f"reduction_layer={self.reduction_layer}: {layers}; vision_top_k={self.vision_top_k} would silently do "
                "nothing"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dict; `from_dict` reads it back, through JSON too."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a config from `to_dict`'s dict; missing fields take their defaults, unknown ones are refused.

        Raises:
            TypeError, ValueError: it is no dict, or what construction raises.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"values: expected a dict of settings, got {values!r} ({type(values).__name__})")
        known = [own.name for own in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"values: unknown fields {unknown}, expected some of {known}")
        return cls(**values)


class StagedConfig(ReductionConfig):
    """Base of configs that keep a share at each of some layers: fields `prune_layers`, `retention`, `keep_ratios`.

    Attributes:
        steepness: each stage's keep ratio as a share of the one before.
    """

    steepness: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_ratios is not None:
            if self.steepness != 1.0:
                raise ValueError(f"steepness={self.steepness}: expected 1.0 with keep_ratios={self.keep_ratios}")
            if self.retention != 1.0:
                raise ValueError(
                    f"retention={self.retention} and keep_ratios={self.keep_ratios}: expected one of the two, got both"
                )
            if len(self.keep_ratios) != len(self.prune_layers):
                raise ValueError(
                    f"keep_ratios={self.keep_ratios}: expected one ratio for each of "
                    f"prune_layers={self.prune_layers}, got {len(self.keep_ratios)} for {len(self.prune_layers)}"
                )
        if not self.prune_layers and (self.retention != 1.0 or self.keep_ratios is not None):
            given = f"retention={self.retention}" if self.keep_ratios is None else f"keep_ratios={self.keep_ratios}"
            raise ValueError(
                f"{given} with prune_layers=(): unsupported combination, it would silently do nothing; "
                "expected the layers to prune at"
            )
        if self.prune_layers and self.keep_ratios is None and self._first_keep_ratio > 1.0:
            raise ValueError(
                f"steepness={self.steepness} with retention={self.retention} over {len(self.prune_layers)} stages: the "
                f"first one would keep {self._first_keep_ratio:.3f} of its tokens, expected at most 1"
            )

    @property
    def stage_keep_ratios(self) -> tuple[float, ...]:
        """Share of the entering vision tokens that each stage keeps, one per prune layer."""
        if self.keep_ratios is not None:
            return self.keep_ratios
        stages = len(self.prune_layers)
        first = self._first_keep_ratio if stages else 1.0
        return tuple(first * self.steepness**stage for stage in range(stages))

    @property
    def _first_keep_ratio(self) -> float:
        """That with which all stages together keep `retention`."""
        stages = len(self.prune_layers)
        return (self.retention / self.steepness ** (stages * (stages - 1) / 2)) ** (1 / stages)

    def vision_left(self, stage: int, n_vision: int) -> int:
        """Vision tokens of one sample that leave a stage (counted from 0) which `n_vision` enter (method section 2.1).

        Merging does not change their number, so the runs do not matter.
        """
        return prune_plan([n_vision] if n_vision else [], self.stage_keep_ratios[stage], 0.0, 1).target


def checked(default: Any, check: Callable[[str, Any], Any]) -> Any:
    """A dataclass field with its check, (name, value) -> the value as it is stored."""
    return field(default=default, metadata={"check": check})


def int_from(low: int, high: int | None = None) -> Callable[[str, Any], int]:
    expected = f"an int >= {low}" if high is None else f"an int in {low}..{high}"

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})")
        if value < low or (high is not None and value > high):
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
        return int(value)

    return check


def _number(name: str, value: Any, expected: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})")
    # written so that nan fails too
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return float(value)


def number_from(low: float) -> Callable[[str, Any], float]:
    return lambda name, value: _number(name, value, f"a finite number >= {low}", low, sys.float_info.max)


def share(name: str, value: Any) -> float:
    return _number(name, value, "a number in [0, 1]", 0.0, 1.0)


def positive_share(name: str, value: Any) -> float:
    number = _number(name, value, "a number in (0, 1]", 0.0, 1.0)
    if number == 0.0:
        raise ValueError(f"{name}: expected a number in (0, 1], got {value!r}")
    return number


def choice(options: tuple[str, ...]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected one of {', '.join(options)}, got {value!r} ({type(value).__name__})")
        if value not in options:
            raise ValueError(f"{name}: expected one of {', '.join(options)}, got {value!r}")
        return value

    return check


def tuple_of(check: Callable[[str, Any], Any]) -> Callable[[str, Any], tuple]:
    def check_all(name: str, values: Any) -> tuple:
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name}: expected a tuple or list, got {values!r} ({type(values).__name__})")
        return tuple(check(f"{name}[{i}]", value) for i, value in enumerate(values))

    return check_all


def rising_layers(name: str, values: Any) -> tuple[int, ...]:
    layers = tuple_of(int_from(0))(name, values)
    if any(a >= b for a, b in pairwise(layers)):
        raise ValueError(f"{name}: expected layers in rising order, each once, got {layers}")
    return layers


def optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


# of the fields that several methods have; each takes (name, value) and returns the value as it is stored
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "vision_top_k": optional(int_from(1)),
    "reduction_layer": int_from(0),
    "prune_layers": rising_layers,
    "retention": positive_share,
    "keep_ratios": optional(tuple_of(positive_share)),
    "backend": choice(BACKENDS),
    "min_vision_tokens": int_from(0),
}
