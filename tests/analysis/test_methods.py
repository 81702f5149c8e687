"""The grid: methods prune alike where they are compared, and fit models of any depth."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from model.methods import skipping
from model.tiny import tiny_internvl
from transformers import AutoModelForImageTextToText

import fastmmoe
from fastmmoe.families.fingerprint import gates_sha256
from fastmmoe.methods import FastMMoEConfig, MoDESConfig
from fastmmoe.scenes import CHECKPOINT
from fastmmoe.study import methods
from fastmmoe.study.methods import Setting

RESULTS = Path(__file__).parents[2] / "bench/results/quality"


def setting_of_depth(layers):
    return Setting.of(tiny_internvl(num_hidden_layers=layers), 100)


@pytest.fixture(scope="module")
def setting():
    return setting_of_depth(8)


@pytest.mark.parametrize(
    ("layers", "stages", "single"),
    [(4, (1, 2), [1, 2]), (8, (1, 2, 3), [1, 2, 4]), (13, (1, 2, 3), [1, 3, 6]), (14, (5, 8, 12), [1, 3, 7])],
)
def test_placements_fit_the_depth(layers, stages, single):
    setting = setting_of_depth(layers)
    assert setting.placements["stages"] == stages
    assert [where for name, where in setting.placements.items() if name != "stages"] == [(i,) for i in single]
    for method in methods.main_grid(setting):
        for config in method.configs:
            config.check_model(layers, setting.top_k)


def test_methods_keep_equally_many_tokens(setting):
    for placement in setting.placements:
        for retention in methods.RETENTIONS:
            left = {}
            for method in methods.at(setting, placement, retention, {}):
                n = 100
                for stage in range(len(method.config.prune_layers)):
                    n = method.config.vision_left(stage, n)
                left[method.name] = n
            assert left["FastMMoE"] == pytest.approx(100 * retention, abs=2)
            assert len(set(left.values())) == 1, left


def test_methods_keep_nearly_equally_many_of_any_number(setting):
    setting = replace(setting, n_vision=None)
    for n in (256, 1792):
        for placement in setting.placements:
            for retention in methods.RETENTIONS:
                for method in methods.at(setting, placement, retention, {}):
                    left = n
                    for stage in range(len(method.config.prune_layers)):
                        left = method.config.vision_left(stage, left)
                    assert left == pytest.approx(n * retention, abs=3), method


def test_baselines_prune_behind_the_layer_that_fastmmoe_prunes_in(setting):
    for method in methods.main_grid(setting):
        if method.placement and method.config.prunes_behind_layer:
            assert method.config.prune_layers == setting.placements[method.placement]


def test_the_grids_are_those_of_the_results():
    """Names, order, configs: what is measured once can be resumed and compared."""
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype="float32")
    calibrated = methods.read_calibration(RESULTS / "modes.json", gates_sha256(model))
    setting = Setting.of(model, 100, (calibrated,))
    grids = {
        "methods": methods.main_grid(setting),
        "heatmap": [methods.dense(), *methods.heatmap_grid(setting)],
        "ablations": [methods.dense(), *methods.ablation_grid(setting)],
        "budget": [methods.dense(), *methods.budget_grid(setting)],
        "timing": methods.main_grid(setting),
    }
    for part, grid in grids.items():
        rows = json.loads((RESULTS / f"{part}.json").read_text())["rows"]
        measured = {row["method"] for row in rows}
        grid = [method for method in grid if method.name in measured]  # a newer method may not be
        assert [method.key for method in grid] == [methods.key_of(row) for row in rows]
        for method, row in zip(grid, rows, strict=True):
            told = json.loads(json.dumps(method.describe()))
            config = told.pop("config")  # which may have fields since that the row has not
            assert told.items() <= row.items() and (row["config"] or {}).items() <= (config or {}).items()


def test_grids_hold_each_method_once(setting):
    for grid in (methods.main_grid, methods.heatmap_grid, methods.ablation_grid):
        keys = [method.key for method in grid(setting)]
        assert len(set(keys)) == len(keys)
    assert [(m.config.reduction_layer, m.config.vision_top_k) for m in methods.heatmap_grid(setting)] == [
        (layer, top_k) for layer in range(8) for top_k in (1, 2, 3)
    ]


def test_expert_reduction_saves_flops_for_every_method(setting):
    model = tiny_internvl(num_hidden_layers=8)

    def cost(experts):
        return [
            fastmmoe.flops(model, 8, 100, method.config).reduced
            for method in methods.at(setting, "early", 0.5, experts)
        ]

    for all_experts, fewer in zip(*map(cost, setting.expert_reductions), strict=True):
        assert fewer < all_experts


def test_ablations_change_one_factor(setting):
    grid = methods.ablation_grid(setting)
    for method in grid:
        base = next(
            m for m in grid
            if (m.factor, m.name, m.placement, m.retention) == ("base", method.name, method.placement, method.retention)
        )  # fmt: skip
        before, after = base.config.to_dict(), method.config.to_dict()
        changed = {name for name in after if after[name] != before[name]}
        assert changed - {"merge_ratio" if method.factor == "merge_method" else ""} <= {method.factor}


def test_changes_of_a_row_rebuild_its_config(setting):
    for method in methods.ablation_grid(setting):
        changes = methods.changes_of(setting, method.describe()["config"])
        again = methods.fastmmoe_method(setting, "x", method.placement, method.retention, {}, changes)
        assert again.configs == method.configs
    assert methods.changes_of(setting, FastMMoEConfig(prune_layers=(1,), retention=0.5).to_dict()) == {}


def test_a_calibrated_config_is_compared_alone_and_with_pruning(tmp_path):
    path = tmp_path / "modes.json"
    config = skipping(8)
    path.write_text(json.dumps({"type": "MoDESConfig", "config": config.to_dict()}))
    assert methods.read_calibration(path, "digest") == config
    found = Setting.of(tiny_internvl(num_hidden_layers=8), 100, (config,))
    grid = [method for method in methods.main_grid(found) if isinstance(method.config, MoDESConfig)]
    alone, *pruned = grid
    assert alone.config == config and {method.name for method in pruned} == {"MoDES"}
    assert len(pruned) == len(found.expert_reductions) * len(found.placements) * len(methods.RETENTIONS)
    assert all(method.config.text_importance == config.text_importance for method in pruned)
    with pytest.raises(ValueError, match="text_importance"):
        Setting.of(tiny_internvl(), 100, (config,))
    with pytest.raises(ValueError, match="expert_budget=8: expected fewer than the model's 8 experts"):
        Setting.of(tiny_internvl(num_hidden_layers=8), 100, (replace(config, expert_budget=8),))
    for content in ("", "{}", '{"type": "Other", "config": {}}', '{"type": "MoDESConfig", "config": {"speed": 1}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="holds no config"):
            methods.read_calibration(path, "digest")
