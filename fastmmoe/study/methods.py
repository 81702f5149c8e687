"""What is compared: every way of pruning, where, how much, with all and with fewer experts.

A method enters the study by its config's `study_entries`; a new keyword of `FastMMoEConfig` as a row of
`STUDY_VARIANTS` beside it, or a factor of `FACTORS` here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastmmoe.config import ReductionConfig
from fastmmoe.families import Family, architecture_of, find_text_model
from fastmmoe.methods import METHODS, FastMMoEConfig
from fastmmoe.methods.entry import Entry, Place
from fastmmoe.methods.fastmmoe import STUDY_VARIANTS, fitting_layers, study_configs
from fastmmoe.methods.files import CONFIGS, read_config_file
from fastmmoe.prefill.plan import Plan

RETENTIONS = (0.75, 0.5, 0.25)
CHOSEN = "FastMMoE, chosen on dev"
BUDGET_SHARES = (0.5, 0.375, 0.25, 0.125)  # of a layer's experts

# ablations: one factor at a time away from a base, whose own setting stands among the values or not
ABLATION_RETENTIONS = (0.25,)  # where methods differ
ABLATION_BASES = STUDY_VARIANTS
FACTORS: dict[str, tuple[dict[str, Any], ...]] = {
    "window": tuple({"window": window} for window in (1, 2, 3, 5, 10)),
    "alpha": tuple({"alpha": alpha} for alpha in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)),
    "merge_ratio": tuple({"merge_ratio": ratio} for ratio in (0.0, 0.025, 0.1, 0.25, 0.5)),
    "strategy": tuple({"strategy": name} for name in ("hybrid", "routing_similarity", "dynamic_attention")),
    # with enough merges to see a difference
    "merge_method": tuple({"merge_method": name, "merge_ratio": 0.25} for name in ("mlerp", "mean")),
}


@dataclass(frozen=True)
class Method:
    """One way to run the prefill.

    Attributes:
        name: what the tables call it.
        placement: name of the layers it prunes at, "" where it prunes nowhere.
        retention: share of the vision tokens left, 1.0 where it prunes nothing.
        configs: batch i runs under `configs[i % len(configs)]`; empty: the dense model.
        factor: what an ablation changes, "" otherwise.
    """

    name: str
    placement: str = ""
    retention: float = 1.0
    configs: tuple[ReductionConfig, ...] = ()
    factor: str = ""

    def config_of(self, batch: int) -> ReductionConfig | None:
        return self.configs[batch % len(self.configs)] if self.configs else None

    @property
    def config(self) -> ReductionConfig | None:
        return self.config_of(0)

    @property
    def expert_budget(self) -> int | None:
        """How many experts the vision tokens of a forward share: what a prompt gets depends on its batch."""
        return getattr(self.config, "expert_budget", None)

    def describe(self) -> dict[str, Any]:
        """The first columns of a row of results."""
        config, budget = self.config, self.expert_budget
        top_k = None if config is None else config.vision_top_k
        has_fewer = top_k is not None or budget is not None
        described = {
            "method": self.name,
            "factor": self.factor,
            "placement": self.placement,
            "prune_layers": [] if config is None else list(config.prune_layers),
            "retention": self.retention,
            "vision_top_k": top_k,
            "reduction_layer": config.reduction_layer if has_fewer else None,
            "config": None if config is None else {"type": type(config).__name__, **config.to_dict()},
        }
        return described if budget is None else described | {"expert_budget": budget}

    @property
    def key(self) -> tuple:
        """What tells it from the study's other methods."""
        return _key(self.describe())


def key_of(row: Mapping[str, Any]) -> tuple:
    """`Method.key` of the method that a row of results is about; what its config lacked then has its default."""
    if row["config"] is None:
        return _key(row)
    values = dict(row["config"])
    kind = CONFIGS[values.pop("type")]
    return _key({**row, "config": {"type": kind.__name__, **kind.from_dict(values).to_dict()}})


def _key(row: Mapping[str, Any]) -> tuple:
    config = sorted((row["config"] or {}).items(), key=lambda item: item[0])
    return row["method"], row["factor"], row["placement"], row["retention"], repr(config)


@dataclass(frozen=True)
class Setting:
    """What the grid needs to know of a model and its prompts.

    Attributes:
        layers, top_k: the text model's depth and K.
        preset: of its family, at layers that fit.
        n_vision: vision tokens of every prompt; None where prompts differ.
        calibrated: configs that were found for the model.
        budgets: numbers of distinct experts that vision tokens may share, falling; none where they cannot.
        no_budget: why they cannot; "" where they can.
    """

    layers: int
    top_k: int
    preset: FastMMoEConfig
    n_vision: int | None
    calibrated: tuple[ReductionConfig, ...] = ()
    budgets: tuple[int, ...] = ()
    no_budget: str = ""

    @classmethod
    def of(cls, model: PreTrainedModel, n_vision: int | None, calibrated: tuple[ReductionConfig, ...] = ()) -> Setting:
        family, text, _ = find_text_model(model)
        moe = next(layer for layer in text.layers if family.is_moe(layer))
        top_k = family.routing_options(family.gate_of(moe))["top_k"]
        official = fitting_layers(model, len(text.layers))
        preset = FastMMoEConfig.preset(model, retention=0.5, prune_layers=official)
        for config in calibrated:
            Plan.of(family, text, config)  # refuses what does not fit
        reason = _why_no_budget(family, text, top_k)
        budgets = () if reason else _budgets(architecture_of(text.config).num_experts, top_k)
        return cls(len(text.layers), top_k, preset, n_vision, calibrated, budgets, reason)

    @property
    def placements(self) -> dict[str, tuple[int, ...]]:
        """Where to prune: the official three stages, and one layer early, a quarter and half of the way up."""
        # behind layer 1 is where methods with one stage usually prune
        single = {"early": 1, "quarter": max(2, self.layers // 4), "half": max(3, self.layers // 2)}
        found = {"stages": self.preset.prune_layers}
        return found | {name: (layer,) for name, layer in single.items() if layer < self.layers - 1}

    @property
    def expert_reductions(self) -> tuple[dict[str, Any], ...]:
        """All experts, and the preset's half of them from the preset's layer on."""
        preset = self.preset
        return {}, {"vision_top_k": preset.vision_top_k, "reduction_layer": preset.reduction_layer}

    def place(self, placement: str, retention: float, experts: Mapping[str, Any]) -> Place:
        """What a method is told of the layers of that name."""
        return Place(self.placements[placement], retention, experts, self.n_vision, self.preset, self.calibrated)


def read_calibration(path: Path, gates: str) -> ReductionConfig:
    """A config that was found for a model, from the file of its calibration.

    Args:
        gates: `gates_sha256` of the model. A file that was written by hand does not say of which model it is.

    Raises:
        ValueError: it cannot be read, holds none, or that of another model.
    """
    config, model = read_config_file(path)
    if model not in (None, gates):
        raise ValueError(f"calibration: {path} is of another model (gates {model[:12]}, expected {gates[:12]})")
    return config


def entries() -> list[Entry]:
    """Those of all methods, in the order of the registry."""
    return [entry for config in METHODS for entry in config.study_entries()]


def dense() -> Method:
    return Method("dense")


def main_grid(setting: Setting) -> list[Method]:
    """Every method at every placement and retention, with all experts and with fewer; the dense model first."""
    methods = [dense(), *(Method("as calibrated", configs=(config,)) for config in setting.calibrated)]
    for experts in setting.expert_reductions:
        if experts:
            methods.append(Method("fewer experts only", configs=(FastMMoEConfig(**experts),)))
        for placement in setting.placements:
            for retention in RETENTIONS:
                methods += at(setting, placement, retention, experts)
    return methods


def at(setting: Setting, placement: str, retention: float, experts: Mapping[str, Any]) -> Iterator[Method]:
    """All methods that have a place at one placement, with equal retention behind its last layer."""
    place = setting.place(placement, retention, experts)
    for entry in entries():
        if configs := entry.configs(place):
            yield Method(entry.name, placement, retention, configs)


def fastmmoe_method(
    setting: Setting,
    name: str,
    placement: str,
    retention: float,
    experts: Mapping[str, Any],
    changes: Mapping[str, Any],
    factor: str = "",
) -> Method:
    """FastMMoE by the family's preset with `changes`, all experts unless `experts` says otherwise."""
    configs = study_configs(changes, setting.place(placement, retention, experts))
    return Method(name, placement, retention, configs, factor)


def heatmap_grid(setting: Setting) -> list[Method]:
    """Fewer experts alone, for every first layer l_v and number of experts K_v < K."""
    return [
        Method("fewer experts only", configs=(FastMMoEConfig(vision_top_k=top_k, reduction_layer=layer),))
        for layer in _heatmap_layers(setting.layers)
        for top_k in range(1, setting.top_k)
    ]


def budget_grid(setting: Setting) -> list[Method]:
    """An expert budget alone, for every number B and first layer; none where the model allows no budget."""
    depth = setting.layers
    return [
        Method("expert budget", configs=(FastMMoEConfig(expert_budget=budget, reduction_layer=layer),))
        for layer in sorted({0, 2, depth // 4, depth // 2})
        for budget in setting.budgets
        if layer < depth
    ]


def ablation_grid(setting: Setting) -> list[Method]:
    """One factor at a time away from each base, at every placement, all experts; equal configs once."""
    methods: dict[tuple, Method] = {}
    for placement, retention in product(setting.placements, ABLATION_RETENTIONS):
        for base, own in ABLATION_BASES.items():
            for factor, settings in {"base": ({},), **FACTORS}.items():
                for changes in settings:
                    method = fastmmoe_method(setting, base, placement, retention, {}, own | changes, factor)
                    methods.setdefault((base, method.configs), method)
    return list(methods.values())


def chosen_grid(setting: Setting, name: str, changes: Mapping[str, Any]) -> list[Method]:
    """One setting of FastMMoE at every placement and retention, with all experts and with fewer."""
    return [
        fastmmoe_method(setting, name, placement, retention, experts, changes)
        for experts in setting.expert_reductions
        for placement in setting.placements
        for retention in RETENTIONS
    ]


def changes_of(setting: Setting, config: Mapping[str, Any]) -> dict[str, Any]:
    """How a row's FastMMoE config differs from the preset, apart from where and how much it prunes."""
    apart = {"vision_top_k", "reduction_layer", "expert_budget", "prune_layers", "retention", "keep_ratios"}
    names = [field.name for field in fields(FastMMoEConfig) if field.name not in apart]
    return {name: config[name] for name in names if config[name] != getattr(setting.preset, name)}


def _why_no_budget(family: Family, text: nn.Module, top_k: int) -> str:
    """What refuses the smallest expert budget; "" if nothing does."""
    try:
        Plan.of(family, text, FastMMoEConfig(expert_budget=top_k, reduction_layer=0))
    except ValueError as error:
        return str(error)
    return ""


def _budgets(num_experts: int, top_k: int) -> tuple[int, ...]:
    """Shares of a layer's experts, as many as a token takes at least."""
    return tuple(sorted({max(top_k, round(share * num_experts)) for share in BUDGET_SHARES}, reverse=True))


def _heatmap_layers(depth: int) -> tuple[int, ...]:
    """At most twelve layers, evenly from the first on."""
    step = -(-depth // 12)
    return tuple(range(0, depth, step))
