"""Which settings hold on other questions and on the other model's pictures: the headline rows, under several seeds.

    python bench/quality/headline.py --out bench/results/quality/headline \\
        --calibration bench/results/quality/modes.json \\
        --chosen scenes=bench/results/quality --chosen pages=bench/results/pages
    for seed in 2 3 4; do python bench/pages/write.py --out pages/test$seed --seed $seed --n 1000; done
    python bench/quality/headline.py --out bench/results/pages/headline --model bench/pages/checkpoint \\
        --data pages/test2/questions.jsonl --data pages/test3/questions.jsonl --data pages/test4/questions.jsonl \\
        --calibration bench/results/pages/modes.json \\
        --chosen scenes=bench/results/quality --chosen pages=bench/results/pages

A setting that a study chose on its own dev questions meets here the test questions of its model, which had no say, and
those of the other model, which is another architecture on other pictures. Every method prunes at the official stages,
and once, half of the way up. Results go to one file per seed, and to `summary.json`; a second run goes on with them.
"""

import hashlib
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from provenance import provenance, write_json

from fastmmoe.methods import FastMMoEConfig, SparseVLMConfig
from fastmmoe.study.accuracy import answers_of, binomial_error, paired_difference
from fastmmoe.study.methods import RETENTIONS, Method, Setting, at, dense, fastmmoe_method, key_of
from fastmmoe.study.results import PartFile, header, read_parts
from fastmmoe.study.study import Session, Settings, choose

LEADER = "FastMMoE"
PLACEMENTS = ("stages", "half")
RANK_SCALES = (1.0, 1.5, 2.0)  # of SparseVLM, where every picture has a retention of its own
SEEDS = 3  # of scenes, from 1 on: the study's is 0

Row = dict[str, Any]


def grid(setting: Setting, chosen: dict[str, dict[str, Any]]) -> list[Method]:
    """The dense model, skipping and sharing of experts alone, and every pruning at two places; all experts."""
    methods = [dense(), *(Method("MoDES, all tokens", configs=(config,)) for config in setting.calibrated)]
    for budget in setting.budgets:
        methods.append(Method("expert budget", configs=(FastMMoEConfig(expert_budget=budget, reduction_layer=2),)))
    layers = setting.placements["stages"]
    for scale in RANK_SCALES:
        own = SparseVLMConfig(layers, rank_scale=scale)
        methods.append(Method("SparseVLM, retention per picture", "stages", configs=(own,)))
    for placement in PLACEMENTS:
        for retention in RETENTIONS:
            methods += at(setting, placement, retention, {})
            for name, changes in chosen.items():
                methods.append(
                    fastmmoe_method(setting, f"FastMMoE, chosen on {name}", placement, retention, {}, changes)
                )
    return methods


def run(settings: Settings, chosen: dict[str, Path], out: Path) -> list[Row]:
    """The rows of one seed, those first that are in `out` already."""
    session = Session(settings)
    setting = session.setting
    changes = {
        label: choose(setting, read_parts(study, ["ablations"])["ablations"]["rows"]) for label, study in chosen.items()
    }
    asked = {"model": session.describe_model(), "seed": settings.seed, "n": settings.n, "chosen": changes}
    if settings.data is not None:
        asked["data_sha256"] = hashlib.sha256(settings.data.read_bytes()).hexdigest()
    out.mkdir(parents=True, exist_ok=True)
    name = f"seed{settings.seed}"
    file = PartFile(out, name, header(asked, ["headline rows under one seed; see summary.json"]), resume=True)
    methods = grid(setting, changes)
    done = {key_of(row): row for row in file.rows}
    for method in tqdm(methods, name, unit="method"):
        if method.key not in done:
            done[method.key] = session.evaluate(settings.split, method)
            file.add(done[method.key])
    file.finish(done[method.key] for method in methods)
    return file.rows


def summary(seeds: list[list[Row]]) -> list[Row]:
    """A row per method: its accuracy under all seeds together and under each, and its lead over FastMMoE's preset."""
    found = []
    for rows in zip(*seeds, strict=True):
        first, right = rows[0], [answers_of(row) for row in rows]
        together = np.concatenate(right)
        row = {
            **{name: first[name] for name in ("method", "placement", "retention", "config")},
            "n": len(together),
            "flops_ratio": float(np.mean([row["flops_ratio"] for row in rows])),
            "time_ratio_predicted": first["time_ratio_predicted"],
            "accuracy": float(together.mean()),
            "standard_error": binomial_error(together),
            "accuracies": [float(one.mean()) for one in right],
        }
        place = first["placement"], first["retention"]
        for leader in zip(*seeds, strict=True):
            is_at_place = leader[0]["method"] == LEADER and (leader[0]["placement"], leader[0]["retention"]) == place
            if is_at_place and first["method"] != LEADER:
                other = [answers_of(one) for one in leader]
                row["lead"], row["lead_error"] = paired_difference(together, np.concatenate(other))
                row["leads"] = [float(one.mean() - two.mean()) for one, two in zip(right, other, strict=True)]
        found.append(row)
    return found


def main(
    out: Annotated[Path, typer.Option(help="Directory for the results.")],
    chosen: Annotated[list[str], typer.Option(help="NAME=DIR: a study whose choice on dev is tested; repeat.")],
    model: Annotated[str | None, typer.Option(help="Checkpoint; the package's own by default.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Questions, a file per seed; the package's scenes.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Of the model, by fastmmoe calibrate.")] = None,
    n: Annotated[int, typer.Option(min=2, help="Questions per seed.")] = 1000,
    only: Annotated[
        int | None, typer.Option(min=1, help="One seed, for processes side by side; no comparison.")
    ] = None,
) -> None:
    """Ask every seed's questions under every method, and compare."""
    torch.set_num_threads(1)
    studies = {name: Path(folder) for name, _, folder in (one.partition("=") for one in chosen)}
    for name, folder in studies.items():
        if "ablations" not in read_parts(folder, ["ablations"]):
            raise typer.BadParameter(f"--chosen {name}={folder}: expected a study with complete ablations")
    files = data or [None] * SEEDS
    each = [Settings(model, path, n=n, seed=seed, calibration=calibration) for seed, path in enumerate(files, start=1)]
    if only is not None and only > len(each):
        raise typer.BadParameter(f"--only {only}: expected one of {len(each)} seeds")
    if only is not None:
        run(each[only - 1], studies, out)
        return
    seeds = [run(one, studies, out) for one in each]
    rows = summary(seeds)
    for row in rows:
        line = f"{row['method']:34} {row['placement']:7} {row['retention']:5} {row['accuracy']:.4f}"
        line += f" +- {row['standard_error']:.4f} at {row['flops_ratio']:.3f}"
        if "lead" in row:
            line += f"  leads FastMMoE by {row['lead']:+.4f} +- {row['lead_error']:.4f}"
        print(line)
    write_json(provenance(torch.device("cpu")) | {"rows": rows}, out / "summary.json")


if __name__ == "__main__":
    typer.run(main)
