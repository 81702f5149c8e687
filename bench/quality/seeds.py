"""Whether what the study says of one checkpoint holds for others: the `methods` parts of several studies, side by side.

    python bench/quality/train.py --work train1 --seed 1 --steps 2600 && cp -r train1/checkpoint seed1
    fastmmoe analyze --model seed1 --out bench/results/quality/seed1 --parts methods --n 2000 --workers 1
    # the same with seed 2, and then
    python bench/quality/seeds.py bench/results/quality bench/results/quality/seed1 bench/results/quality/seed2 \\
        --json bench/results/quality/seeds.json

Every directory holds the study of a model trained from another seed. All are compared on the questions that they have
in common: the scenes are numbered, so that a smaller study asks the first questions of a larger one.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

sys.path.append(str(Path(__file__).parents[1]))
from provenance import provenance, write_json

from fastmmoe.study.accuracy import answers_of
from fastmmoe.study.results import read_parts
from quality.leads import lead_over, shown

LEADER = "FastMMoE"
PLACE = ("placement", "retention", "vision_top_k")  # where, how much and with how many experts; methods share it

Row = dict[str, Any]


def rows_of(study: dict[str, Any]) -> dict[tuple, Row]:
    """(method, place) -> row of one model's study."""
    return {(row["method"], *(row[name] for name in PLACE)): row for row in study["rows"]}


def compare(studies: list[dict[str, Any]]) -> list[Row]:
    """A row per method and place: its accuracy with every model, and FastMMoE's lead over it, in the studies' order."""
    models = [rows_of(study) for study in studies]
    n = min(row["n"] for model in models for row in model.values())

    def answers(key: tuple) -> np.ndarray:
        """Right or wrong, [models, questions]."""
        return np.array([answers_of(model[key])[:n] for model in models], dtype=float)

    found = []
    for key, first in models[0].items():
        accuracies = answers(key).mean(1)
        row = {
            "method": first["method"],
            **{name: first[name] for name in PLACE},
            "n": n,
            "flops_ratio": first["flops_ratio"],
            "accuracy": float(accuracies.mean()),
            "accuracies": accuracies.tolist(),
        }
        leader = (LEADER, *key[1:])
        if leader in models[0] and leader != key:
            row |= lead_over(answers(leader), answers(key))
        found.append(row)
    return found


def main(
    directories: Annotated[list[Path], typer.Argument(help="Results of `fastmmoe analyze`, one per model.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Accuracies with every model, and FastMMoE's lead over each method, in the mean and one by one."""
    studies = []
    for directory in directories:
        parts = read_parts(directory, ["methods"])
        if not parts:
            raise typer.BadParameter(f"{directory}: expected a complete methods.json of fastmmoe analyze")
        studies.append(parts["methods"])
    rows = compare(studies)
    for row in rows:
        experts = "all experts" if row["vision_top_k"] is None else f"K_v {row['vision_top_k']}"
        line = f"{row['placement'] or 'all tokens':10} {row['retention'] or 1:4} {experts:11} {row['method']:28}"
        line += f" {row['accuracy']:.3f} at {row['flops_ratio']:.2f}"
        if "leads" in row:
            line += f"  {LEADER} leads by {shown(row)}"
        print(line)
    models = [study["study"]["model"] for study in studies]
    write_json({**provenance(torch.device("cpu")), "models": models, "rows": rows}, json_path)


if __name__ == "__main__":
    typer.run(main)
