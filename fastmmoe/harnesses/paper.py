"""The paper's tables as configuration: which tasks are asked, under which configs.

Of the paper (arXiv 2511.17885) the method, the models, the baselines and the retentions are known here, not its list of
tasks: those below are the ones that public listings of its results name, and `fastmmoe eval` takes others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fastmmoe.config import ReductionConfig
from fastmmoe.families import Architecture
from fastmmoe.methods import METHODS, FastMMoEConfig
from fastmmoe.methods.entry import Place
from fastmmoe.methods.fastmmoe import fitting_layers

RETENTIONS = (0.75, 0.5, 0.25)
DENSE = "dense"
Configs = dict[str, ReductionConfig | None]


@dataclass(frozen=True)
class PaperTable:
    """One table.

    Attributes:
        title: what it shows.
        harness: whose tasks are asked by default, as `fastmmoe eval` names it.
        tasks: names of them.
        batch: prompts at a time, where the harness takes several.
        configs: (model or name, its text model's sizes) -> name of each run -> its config; the dense model's first.
    """

    title: str
    harness: str
    tasks: tuple[str, ...]
    batch: int
    configs: Callable[[Any, Architecture], Configs]


def _preset(model_or_name: Any, shape: Architecture) -> FastMMoEConfig:
    layers = fitting_layers(model_or_name, shape.num_hidden_layers)
    return FastMMoEConfig.preset(model_or_name, retention=0.5, prune_layers=layers)


def _experts_alone(preset: FastMMoEConfig) -> FastMMoEConfig:
    return FastMMoEConfig(vision_top_k=preset.vision_top_k, reduction_layer=preset.reduction_layer)


def _retentions(model_or_name: Any, shape: Architecture) -> Configs:
    """FastMMoE by its preset, and every baseline with all experts, at the preset's layers, or the first of them."""
    preset = _preset(model_or_name, shape)
    found: Configs = {DENSE: None, "fewer experts only": _experts_alone(preset)}
    for retention in RETENTIONS:
        found[f"FastMMoE, {retention:g}"] = replace(preset, retention=retention)
        for entry in (entry for kind in METHODS if kind is not FastMMoEConfig for entry in kind.study_entries()):
            for layers in (preset.prune_layers, preset.prune_layers[:1]):  # some prune once
                if configs := entry.configs(Place(layers, retention, {}, None, preset)):
                    found[f"{entry.name}, {retention:g}"] = configs[0]
                    break
    return found


def _experts(model_or_name: Any, shape: Architecture) -> Configs:
    """Fewer experts alone: every first layer l_v with every K_v."""
    depth, top_k = shape.num_hidden_layers, shape.num_experts_per_tok
    layers = sorted({0, 2, depth // 8, depth // 4, depth // 2})
    counts = sorted({1, top_k // 4, top_k // 2, 3 * top_k // 4} - {0, top_k})
    return {DENSE: None} | {
        f"l_v {layer}, K_v {count}": FastMMoEConfig(vision_top_k=count, reduction_layer=layer)
        for layer in layers
        for count in counts
    }


def _latencies(model_or_name: Any, shape: Architecture) -> Configs:
    """FastMMoE's two halves apart, and both."""
    preset = _preset(model_or_name, shape)
    found: Configs = {DENSE: None, "fewer experts only": _experts_alone(preset)}
    for retention in RETENTIONS:
        found[f"pruning only, {retention:g}"] = replace(preset, retention=retention, vision_top_k=None)
        found[f"FastMMoE, {retention:g}"] = replace(preset, retention=retention)
    return found


TASKS = ("AI2D_TEST", "HallusionBench", "MMBench_DEV_EN", "MMMU_DEV_VAL", "OCRBench", "ScienceQA_TEST")
TABLES: dict[str, PaperTable] = {
    "retention": PaperTable(
        "scores by method and share of the vision tokens left", "vlmevalkit", TASKS, 1, _retentions
    ),
    "experts": PaperTable(
        "scores by first layer l_v and number K_v of experts", "vlmevalkit", ("MMMU_DEV_VAL", "OCRBench"), 1, _experts
    ),
    "latency": PaperTable("time to the first token, per prompt of a batch", "lmms-eval", ("mmmu_val",), 8, _latencies),
}
