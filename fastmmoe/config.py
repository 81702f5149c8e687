"""What FastMMoE does to a prefill: one frozen, validated description, and the presets of the official scripts."""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, ClassVar

from fastmmoe.pruning import FastMMoEPruning, Pruning
from fastmmoe_kernels.layout import prune_plan

STRATEGIES = ("hybrid", "routing_similarity", "dynamic_attention")
MERGE_METHODS = ("mlerp", "mean")
KEEP_BY = ("importance", "redundancy")
BACKENDS = ("auto", "triton", "torch")


class ReductionConfig:
    """Base of every config that `fastmmoe.enable` and `fastmmoe.flops` take: checks, the fit to a model, JSON.

    A subclass is a frozen dataclass. It has the fields `vision_top_k`, `reduction_layer`, `backend` and
    `min_vision_tokens` (see `FastMMoEConfig`), and `prune_layers` as a field or a property. A field is checked by
    `metadata["check"]`, or else by the entry of its name in `CHECKS`.

    Attributes:
        prunes_behind_layer: a prune layer's output is shortened; else the input of its MoE.
    """

    prunes_behind_layer: ClassVar[bool] = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check = field.metadata.get("check") or CHECKS[field.name]
            object.__setattr__(self, field.name, check(field.name, getattr(self, field.name)))

    def vision_left(self, stage: int, n_vision: int) -> int:
        """Vision tokens of one sample that leave a stage (counted from 0) which `n_vision` enter."""
        raise NotImplementedError

    def pruning(self) -> Pruning:
        """The config's way of pruning, for the hooks."""
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
    def from_dict(cls, values: Mapping[str, Any]) -> "ReductionConfig":
        """Build a config from `to_dict`'s dict; missing fields take their defaults, unknown ones are refused."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"values: unknown fields {unknown}, expected some of {known}")
        return cls(**values)


class StagedConfig(ReductionConfig):
    """Base of configs that keep a share at each of some layers: fields `prune_layers`, `retention`, `keep_ratios`.

    Attributes:
        steepness: each stage's keep ratio as a share of the one before.
    """

    steepness = 1.0

    def __post_init__(self):
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


@dataclass(frozen=True)
class FastMMoEConfig(StagedConfig):
    """What to reduce, where, and by how much. The default reduces nothing.

    Every value is checked on construction; numbers are stored as plain ints and floats, lists as tuples.

    Args:
        vision_top_k: experts per vision token, K_v (method section 1); None leaves the model's own K.
        reduction_layer: first layer that uses `vision_top_k`, l_v; layers count from 0.
        prune_layers: layers that prune vision tokens (method section 2), rising; empty prunes nothing.
        retention: overall share of the vision tokens left after the last stage, in (0, 1]; every one of m stages
            keeps `retention ** (1 / m)`. Stays at 1.0 when `keep_ratios` is given.
        keep_ratios: the share each stage keeps of the vision tokens that enter it, in (0, 1], one per prune layer.
        merge_ratio: share of a stage's survivors that are merged windows, in [0, 1].
        window: tokens per window, W, at least 1.
        alpha: weight of routing similarity against attention in the redundancy of "hybrid", in [0, 1].
        strategy: "hybrid", "routing_similarity" or "dynamic_attention".
        merge_method: "mlerp" or "mean".
        keep_by: what ranks the tokens outside merged windows: "importance" (method section 2.6), or "redundancy", the
            redundancy of their window (**ours**, see `fastmmoe_kernels.prune_batch`).
        steepness: each stage's keep ratio as a share of the one before, in (0, 1]; below 1, early stages are gentle and
            later ones harsh (**ours**). For `retention`, not for `keep_ratios`.
        backend: "auto" (Triton on a GPU, else torch), "triton" or "torch".
        min_vision_tokens: a prefill with fewer vision tokens than this, over its whole batch, runs the stock model:
            below a break-even point, which depends on model and hardware and which `bench/bench_prefill.py` measures,
            there is no time to save. The default never skips.

    Raises:
        TypeError: a value of another type (bools are no numbers here).
        ValueError: a value out of range, or a combination that contradicts itself or would silently do nothing.
    """

    vision_top_k: int | None = None
    reduction_layer: int = 2
    prune_layers: tuple[int, ...] = ()
    retention: float = 1.0
    keep_ratios: tuple[float, ...] | None = None
    merge_ratio: float = 0.025
    window: int = 3
    alpha: float = 0.5
    strategy: str = "hybrid"
    merge_method: str = "mlerp"
    backend: str = "auto"
    min_vision_tokens: int = 0
    keep_by: str = "importance"
    steepness: float = 1.0

    def pruning(self) -> Pruning:
        return FastMMoEPruning(self)

    @classmethod
    def preset(cls, model_or_name: Any, retention: float = 1.0, **overrides: Any) -> "FastMMoEConfig":
        """The official scripts' settings for a model family, K_v = K / 2 experts per vision token included.

        Args:
            model_or_name: a transformers model or config, a model type ("internvl"), or a name ("internvl3.5",
                "OpenGVLab/InternVL3_5-30B-A3B-HF").
            retention: overall share of vision tokens kept, in (0, 1]; 1.0 prunes nothing.
            overrides: any other field of `FastMMoEConfig`, in place of the preset's value.

        Raises:
            ValueError: no preset for this model or name, or one that does not fit the model's number of layers.
        """
        if isinstance(model_or_name, str):
            text_config = None
            key = plain_name(model_or_name)
            row = next((p for p in _PRESETS if key in p.model_types or re.fullmatch(p.names, key)), None)
            shown = repr(model_or_name)
        else:
            text_config = text_config_of(model_or_name)
            model_type = getattr(getattr(model_or_name, "config", model_or_name), "model_type", None)
            row = next((p for p in _PRESETS if model_type in p.model_types), None)
            shown = f"a {type(model_or_name).__name__} of model type {model_type!r}"
        if row is None:
            supported = "; ".join(p.supported for p in _PRESETS)
            raise ValueError(f"model_or_name: no preset for {shown}, expected one of: {supported}")
        top_k = row.num_experts_per_tok if text_config is None else getattr(text_config, "num_experts_per_tok", None)
        if top_k is None:
            raise ValueError(f"model_or_name: {shown} has no experts (num_experts_per_tok), expected a MoE text model")

        values: dict[str, Any] = {
            "vision_top_k": max(1, top_k // 2),
            "retention": retention,
            "alpha": row.alpha,
            "merge_ratio": row.merge_ratio,
        }
        if retention != 1.0 or overrides.get("keep_ratios") is not None:
            values["prune_layers"] = row.prune_layers
        config = cls(**(values | overrides))
        if text_config is not None:
            config.check_model(text_config.num_hidden_layers, top_k)
        return config

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] = os.environ, *, num_experts_per_tok: int | None = None
    ) -> "FastMMoEConfig":
        """Read the variables of the official scripts; unset or empty ones leave the defaults.

        `KEEP_TOKEN_RATIO` is the overall retention when it is one number, and the stages' keep ratios when it is a
        comma list. `VISION_EXPERT_REDUCE_FACTOR` f means K_v = max(1, int(K * f)) and so needs K.

        Args:
            environ: the variables.
            num_experts_per_tok: the model's K; required if `VISION_EXPERT_REDUCE_FACTOR` is set.

        Raises:
            ValueError: a malformed or impossible value; the error names the variable.
        """
        given = {name: text for name in _ENVIRONMENT if (text := environ.get(name, "").strip())}
        values: dict[str, Any] = {}
        for name, text in given.items():
            field, parse = _ENVIRONMENT[name]
            if name == "KEEP_TOKEN_RATIO" and "," in text:
                field, parse = "keep_ratios", _list_of(float)
            try:
                value = parse(text)
                if name == "VISION_EXPERT_REDUCE_FACTOR":
                    if num_experts_per_tok is None:
                        raise ValueError("expected num_experts_per_tok, the model's experts per token, along with it")
                    value = max(1, int(num_experts_per_tok * share("factor", value)))
                values[field] = CHECKS[field](field, value)
            except ValueError as error:
                raise ValueError(f"environment variable {name}={text!r}: {error}") from error
        try:
            return cls(**values)
        except ValueError as error:
            shown = ", ".join(f"{name}={text!r}" for name, text in given.items())
            raise ValueError(f"environment variables {shown}: {error}") from error


def text_config_of(model_or_config: Any) -> Any:
    """The text model's config of a transformers model or (composite) config."""
    config = getattr(model_or_config, "config", model_or_config)
    return getattr(config, "text_config", None) or config


def plain_name(name: str) -> str:
    """Reduce a hub name or path to a key: ".../InternVL3_5-30B-A3B-HF" is "internvl3.5-30b-a3b-hf"."""
    name = name.rstrip("/").rsplit("/", 1)[-1].lower()
    # "3_5" and "3.5" are both in use; a model type (qwen3_moe) keeps its underscore
    return re.sub(r"(?<=\d)_(?=\d)", ".", name)


@dataclass(frozen=True)
class _Preset:
    """One model family's settings in the official scripts, and what it is called by."""

    supported: str  # for the error that lists what there is
    names: str  # pattern of the plain names, see plain_name
    model_types: tuple[str, ...]  # of a composite or of its text config
    num_experts_per_tok: int  # for names; a model or config brings its own
    prune_layers: tuple[int, ...]
    alpha: float
    merge_ratio: float


# l_v = 2, W = 3, hybrid and mlerp are the same for both families, and FastMMoEConfig's defaults
_PRESETS = (
    _Preset(
        supported="InternVL3.5 (a model or config of type internvl or qwen3_moe; names such as internvl3.5, "
        "internvl3.5-30b-a3b, internvl3.5-241b-a28b)",
        # the family's other sizes are dense or have another K
        names=r"internvl3\.5(-(30b-a3b|241b-a28b)(-.*)?)?",
        model_types=("internvl", "qwen3_moe"),
        num_experts_per_tok=8,
        prune_layers=(5, 8, 12),
        alpha=0.5,
        merge_ratio=0.025,
    ),
    _Preset(
        supported="DeepSeek-VL2 (a model or config of type deepseek_vl_v2; the names deepseek-vl2, "
        "deepseek-vl2-small, deepseek-vl2-tiny)",
        names=r"deepseek-vl2(-small|-tiny)?",
        model_types=("deepseek_vl_v2",),
        num_experts_per_tok=6,
        prune_layers=(2, 5, 8),
        alpha=0.3,
        merge_ratio=0.05,
    ),
)


def int_from(low: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}: expected an int >= {low}, got {value!r} ({type(value).__name__})")
        if value < low:
            raise ValueError(f"{name}: expected an int >= {low}, got {value!r}")
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


def _list_of(parse: Callable[[str], Any]) -> Callable[[str], list]:
    return lambda text: [parse(part) for part in text.split(",")]


# each takes (name, value) and returns the value as it is stored
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "vision_top_k": optional(int_from(1)),
    "reduction_layer": int_from(0),
    "prune_layers": rising_layers,
    "retention": positive_share,
    "keep_ratios": optional(tuple_of(positive_share)),
    "merge_ratio": share,
    "window": int_from(1),
    "alpha": share,
    "strategy": choice(STRATEGIES),
    "merge_method": choice(MERGE_METHODS),
    "backend": choice(BACKENDS),
    "min_vision_tokens": int_from(0),
    "keep_by": choice(KEEP_BY),
    "steepness": positive_share,
}

# official variable -> field it sets, how its text is read
_ENVIRONMENT: dict[str, tuple[str, Callable[[str], Any]]] = {
    "REDUCTION_LAYER_IDX": ("reduction_layer", int),
    "VISION_EXPERT_REDUCE_FACTOR": ("vision_top_k", float),
    "TOKEN_MERGE_STRATEGY": ("strategy", str),
    "BASE_ALPHA": ("alpha", float),
    "MERGE_RATIO": ("merge_ratio", float),
    "TOKEN_MERGE_METHOD": ("merge_method", str),
    "MERGE_LAYER_LOCS": ("prune_layers", _list_of(int)),
    "KEEP_TOKEN_RATIO": ("retention", float),
    "ROUTING_SIMILARITY_WINDOW_SIZE": ("window", int),
}
