"""A user's program that names every public type, for a type checker to read; it is not run."""

from pathlib import Path
from typing import Any, assert_type

import numpy as np
import torch
from torch import nn

import fastmmoe
from fastmmoe import FastMMoEConfig, FastVConfig, MoDESConfig, RandomConfig, SparseVLMConfig, UniformConfig
from fastmmoe.config import ReductionConfig
from fastmmoe_kernels import VisionLayout


def configs(model: nn.Module, path: Path) -> list[ReductionConfig]:
    preset = FastMMoEConfig.preset(model, retention=0.5, vision_top_k=4)
    assert_type(preset, FastMMoEConfig)
    assert_type(FastMMoEConfig.from_dict(preset.to_dict()), FastMMoEConfig)
    assert_type(FastVConfig.from_dict({}), FastVConfig)
    assert_type(MoDESConfig.from_file(path), MoDESConfig)
    assert_type(preset.to_dict(), dict[str, Any])
    assert_type(preset.prune_layers, tuple[int, ...])
    assert_type(preset.retention, float)
    several: list[ReductionConfig] = [
        preset,
        FastMMoEConfig(vision_top_k=4, prune_layers=(5, 8, 12), retention=0.25, keep_by="redundancy"),
        FastVConfig(layer=2, retention=0.5),
        SparseVLMConfig(layers=(2, 6, 15), keep_ratios=(0.5, 0.5, 0.5)),
        RandomConfig(prune_layers=(2,), retention=0.5, seed=1),
        UniformConfig(prune_layers=(2,), retention=0.5),
    ]
    return several


def run(model: nn.Module, inputs: dict[str, Any], layout: VisionLayout) -> None:
    config = FastMMoEConfig.preset(model)
    assert_type(fastmmoe.enable(model, config), None)
    with fastmmoe.enabled(model, config) as same:
        assert_type(same, nn.Module)
    with fastmmoe.fixed_layout(model, layout):
        model(**inputs)
    assert_type(fastmmoe.pack_batch(inputs), dict[str, Any])
    found = fastmmoe.report(model)
    assert_type(found, fastmmoe.PrefillReport)
    assert_type(found.tokens_per_layer, tuple[tuple[int, ...], ...])
    assert_type(found.flops.saved, float)
    assert_type(found.time("h100").speedup, float)
    assert_type(found.to_dict(), dict[str, Any])
    for stage in found.stages:
        assert_type(stage, fastmmoe.StageReport)
        assert_type(stage.kept, tuple[int, ...])
        assert isinstance(stage.fate[0], np.ndarray)
    assert_type(fastmmoe.disable(model), None)


def calculate(config: FastMMoEConfig) -> float:
    flops = fastmmoe.flops("internvl3.5-30b-a3b", 100, [1792, 256], config)
    assert_type(flops, fastmmoe.FlopsReport)
    assert_type(flops.per_layer[0].moe_tokens, int)
    time = fastmmoe.prefill_time("internvl3.5-30b-a3b", 100, 1792, config, device="h100")
    assert_type(time, fastmmoe.TimeReport)
    assert_type(time.per_layer[0].dense, float)
    return flops.saved * time.speedup


def titles() -> list[str]:
    rows = fastmmoe.families()
    assert_type(rows, tuple[fastmmoe.FamilySupport, ...])
    return [row.title for row in rows if row.experts]


def layout_of(ids: torch.Tensor) -> VisionLayout:
    layout = VisionLayout.from_mask(ids == 7)
    assert_type(layout, VisionLayout)
    return layout
