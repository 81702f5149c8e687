"""FastMMoE (arXiv 2511.17885): fewer experts for vision tokens, and redundant ones merged or dropped."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Self

import torch

from fastmmoe.config import (
    CHECKS,
    ExpertChoice,
    StagedConfig,
    checked,
    choice,
    int_from,
    optional,
    positive_share,
    share,
)
from fastmmoe.families import find_preset
from fastmmoe.families.family import PRUNE_SHARES
from fastmmoe.methods.entry import Entry, Place
from fastmmoe.methods.method import AttentionCall, Pruning, StageInput, last_row
from fastmmoe_kernels import PrunedBatch, prune_batch
from fastmmoe_kernels.layout import MOST_TOKENS

STRATEGIES = ("hybrid", "routing_similarity", "dynamic_attention")
MERGE_METHODS = ("mlerp", "mean")
KEEP_BY = ("importance", "redundancy")

# of presets that keep by redundancy: chosen on scenes, far ahead of the default ranking on pages of text too (README)
REDUNDANCY_ALPHA = 0.75

# in the study: changes to the preset, as the official scripts set it and our own
STUDY_VARIANTS: dict[str, dict[str, Any]] = {
    "FastMMoE": {},
    "FastMMoE, keep by redundancy": {"keep_by": "redundancy", "alpha": REDUNDANCY_ALPHA},
}


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
        window: tokens per window, W, 1 to 2**30.
        alpha: weight of routing similarity against attention in the redundancy of "hybrid", in [0, 1].
        strategy: "hybrid", "routing_similarity" or "dynamic_attention".
        merge_method: "mlerp" or "mean".
        keep_by: what ranks the tokens outside merged windows: "importance" (method section 2.6), or "redundancy", the
            redundancy of their window (**ours**, see `fastmmoe_kernels.prune_batch`).
        steepness: each stage's keep ratio as a share of the one before, in (0, 1]; below 1, early stages are gentle and
            later ones harsh (**ours**). For `retention`, not for `keep_ratios`.
        expert_budget: how many different experts all vision tokens of a forward share, in each layer from
            `reduction_layer` on; at least their experts per token (**ours**, see `fastmmoe_kernels.choose_experts`). A
            short prefill on a GPU takes as long as reading every expert that any token comes to: this is what bounds
            it. It holds for a whole forward, all samples of a batch or of a packed row together: what a sample gets
            depends on its neighbours. None: no budget.
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
    merge_ratio: float = checked(0.025, share)
    window: int = checked(3, int_from(1, MOST_TOKENS))
    alpha: float = checked(0.5, share)
    strategy: str = checked("hybrid", choice(STRATEGIES))
    merge_method: str = checked("mlerp", choice(MERGE_METHODS))
    backend: str = "auto"
    min_vision_tokens: int = 0
    keep_by: str = checked("importance", choice(KEEP_BY))
    steepness: float = checked(1.0, positive_share)
    expert_budget: int | None = checked(None, optional(int_from(1)))

    @property
    def reduces_experts(self) -> bool:
        return super().reduces_experts or self.expert_budget is not None

    def expert_choice(self, layer: int, top_k: int) -> ExpertChoice | None:
        choice = super().expert_choice(layer, top_k)
        if self.expert_budget is None or layer < self.reduction_layer:
            return choice
        return replace(choice or ExpertChoice(top_k), budget=self.expert_budget)

    def check_model(self, num_hidden_layers: int, num_experts_per_tok: int) -> None:
        """As `ReductionConfig.check_model`; also refuses a budget below the experts of a vision token."""
        super().check_model(num_hidden_layers, num_experts_per_tok)
        if self.expert_budget is None:
            return
        most = num_experts_per_tok if self.vision_top_k is None else self.vision_top_k
        if self.expert_budget < most:
            raise ValueError(
                f"expert_budget={self.expert_budget}: expected at least the {most} experts of a vision token; give a "
                "vision_top_k that is no larger"
            )
        if self.reduction_layer >= num_hidden_layers:
            raise ValueError(
                f"reduction_layer={self.reduction_layer}: the model has {num_hidden_layers} layers; "
                f"expert_budget={self.expert_budget} would silently do nothing"
            )

    def pruning(self) -> Pruning:
        return FastMMoEPruning(self)

    @classmethod
    def preset(cls, model_or_name: Any, retention: float = 1.0, **overrides: Any) -> Self:
        """The official scripts' settings for a model family, K_v = K / 2 experts per vision token included.

        Args:
            model_or_name: a transformers model or config, a model type, or the name of a released model (a hub id).
            retention: overall share of vision tokens kept, in (0, 1]; 1.0 prunes nothing.
            overrides: any other field of `FastMMoEConfig`, in place of the preset's value. `keep_by="redundancy"`
                brings `alpha=0.75` with it (**ours**, README: chosen on scenes, ahead on pages of dense text).

        Raises:
            PresetTooDeepError: the preset's prune layers do not fit the model's number of layers; the error names
                layers that do.
            ValueError: no preset for this model or name, or a value that is none or does not fit the model.
        """
        family, text_config = find_preset(model_or_name)
        row = family.preset
        top_k = row.num_experts_per_tok if text_config is None else getattr(text_config, family.top_k, None)
        if top_k is None:
            raise ValueError(
                f"model_or_name: {type(model_or_name).__name__} has no experts ({family.top_k}), expected a MoE "
                "text model"
            )

        values: dict[str, Any] = {
            "vision_top_k": None if family.expert_obstacle(text_config) else max(1, top_k // 2),
            "retention": retention,
            "alpha": REDUNDANCY_ALPHA if overrides.get("keep_by") == "redundancy" else row.alpha,
            "merge_ratio": row.merge_ratio,
        }
        if retention != 1.0 or overrides.get("keep_ratios") is not None:
            is_scaled = text_config is not None and not row.official
            layers = family.preset_layers(text_config) if is_scaled else row.prune_layers
            if not layers and "prune_layers" not in overrides:
                reason = family.why_not_prune(text_config, 0)
                raise ValueError(f"retention={retention}: {family.title} cannot prune: {reason}")
            values["prune_layers"] = layers
        config = cls(**(values | overrides))
        if text_config is not None:
            depth = text_config.num_hidden_layers
            if "prune_layers" not in overrides and config.prune_layers and config.prune_layers[-1] >= depth:
                # where nothing has mixed yet, and behind the last layer, there is nothing to prune
                fitting = tuple(layer for layer in family.preset_layers(text_config) if 0 < layer < depth - 1)
                raise PresetTooDeepError(config.prune_layers, depth, fitting)
            config.check_model(depth, top_k)
        return config

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] = os.environ, *, num_experts_per_tok: int | None = None
    ) -> Self:
        """Read the variables of the official scripts; unset or empty ones leave the defaults.

        `KEEP_TOKEN_RATIO` is the overall retention when it is one number, and the stages' keep ratios when it is a
        comma list. `VISION_EXPERT_REDUCE_FACTOR` f means K_v = max(1, int(K * f)) and so needs K.

        Args:
            environ: the variables.
            num_experts_per_tok: the model's K; required if `VISION_EXPERT_REDUCE_FACTOR` is set.

        Raises:
            ValueError: a malformed or impossible value; the error names the variable.
        """
        checks = {own.name: own.metadata.get("check") or CHECKS[own.name] for own in fields(cls)}
        given = {name: text for name in ENVIRONMENT if (text := environ.get(name, "").strip())}
        values: dict[str, Any] = {}
        for name, text in given.items():
            field, parse = ENVIRONMENT[name]
            if name == "KEEP_TOKEN_RATIO" and "," in text:
                field, parse = "keep_ratios", _list_of(float)
            try:
                value = parse(text)
                if name == "VISION_EXPERT_REDUCE_FACTOR":
                    if num_experts_per_tok is None:
                        raise ValueError("expected num_experts_per_tok, the model's experts per token, along with it")
                    value = max(1, int(num_experts_per_tok * share("factor", value)))
                values[field] = checks[field](field, value)
            except ValueError as error:
                raise ValueError(f"environment variable {name}={text!r}: {error}") from error
        try:
            return cls(**values)
        except ValueError as error:
            shown = ", ".join(f"{name}={text!r}" for name, text in given.items())
            raise ValueError(f"environment variables {shown}: {error}") from error

    @classmethod
    def study_entries(cls) -> tuple[Entry, ...]:
        """The variants; the first one is what other methods are compared with."""
        official, own = STUDY_VARIANTS
        return (
            Entry(official, "tab:blue", partial(study_configs, STUDY_VARIANTS[official]), is_reference=True),
            Entry(own, "tab:red", partial(study_configs, STUDY_VARIANTS[own])),
        )


class PresetTooDeepError(ValueError):
    """The preset's prune layers, for a model that has fewer layers.

    Attributes:
        fitting: layers of the model that may prune, at the same shares of its depth; empty if there are none.
    """

    def __init__(self, layers: tuple[int, ...], depth: int, fitting: tuple[int, ...]):
        super().__init__(layers, depth, fitting)
        self.fitting = fitting

    def __str__(self) -> str:
        layers, depth, fitting = self.args
        said = f"prune_layers={layers}: the model has {depth} layers, expected layers from 0 to {depth - 1}"
        if not fitting:
            return f"{said}; it has too few to prune in, expected retention=1.0"
        return (
            f"{said}; the preset is for a deeper one; give prune_layers that fit this model: {fitting} are at the same "
            "shares of its depth"
        )


def fitting_layers(model_or_name: Any, depth: int) -> tuple[int, ...]:
    """The preset's prune layers, or, in a model that is not as deep, those at the same shares of its depth.

    Args:
        model_or_name: as `FastMMoEConfig.preset` takes it.
        depth: layers of its text model.
    """
    try:
        official = FastMMoEConfig.preset(model_or_name, retention=0.5).prune_layers
    except PresetTooDeepError as error:
        return error.fitting
    except ValueError:
        official = (depth,)
    if official[-1] < depth - 1:
        return official
    layers: list[int] = []
    for part in PRUNE_SHARES:
        layers.append(max(round(part * depth), layers[-1] + 1 if layers else 1))
    # behind the last layer there is nothing to save
    return tuple(layer for layer in layers if layer < depth - 1)


def study_configs(changes: Mapping[str, Any], place: Place) -> tuple[FastMMoEConfig, ...]:
    """The family's preset with `changes` at a place, with all experts unless the place or a change says otherwise."""
    where = {"vision_top_k": None, "prune_layers": place.layers, "retention": place.retention}
    return (replace(place.preset, **(where | dict(place.experts) | dict(changes))),)


class FastMMoEPruning(Pruning):
    """Merge redundant windows and keep important tokens (method section 2)."""

    def look(self, call: AttentionCall) -> torch.Tensor:
        return last_row(call, self.config.backend)

    def prune(self, tokens: StageInput) -> PrunedBatch:
        config = self.config
        return prune_batch(
            tokens.hidden,
            tokens.residual,
            tokens.gate_probs(tokens.hidden),
            tokens.seen,
            tokens.layout,
            source=tokens.source,
            keep_ratio=config.stage_keep_ratios[tokens.stage],
            merge_ratio=config.merge_ratio,
            window=config.window,
            alpha=config.alpha,
            strategy=config.strategy,
            keep_by=config.keep_by,
            merge_method=config.merge_method,
            backend=config.backend,
        )


def _list_of(parse: Callable[[str], Any]) -> Callable[[str], list]:
    return lambda text: [parse(part) for part in text.split(",")]


# official variable -> field it sets, how its text is read
ENVIRONMENT: dict[str, tuple[str, Callable[[str], Any]]] = {
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
