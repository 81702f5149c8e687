"""Fill docs/results/paper.md: the paper's tables for both of its families, from what `fastmmoe eval --table` has left.

    fastmmoe eval --table retention --model MODEL --out bench/results/paper/internvl3.5-30b-a3b/retention ...
    python bench/paper/page.py

The files of the runs lie where the page names them. Rows that nobody has run are there, and empty.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmmoe.families import ARCHITECTURES
from fastmmoe.harnesses.paper import DENSE, TABLES, PaperTable

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results/paper"
PAGE = ROOT / "docs/results/paper.md"
MODELS = {"internvl3.5-30b-a3b": "OpenGVLab/InternVL3_5-30B-A3B-HF", "deepseek-vl2": "deepseek-ai/deepseek-vl2"}
HEAD = """# The paper's tables

Written by `python bench/paper/page.py` from `bench/results/paper/`; empty cells were not run.
Scores are the harness's own; *retained* is the mean of the scores' ratios to the dense model's, where there are all of
them; times are per prompt, a batch's shared among its prompts. The paper's own list of
tasks is not known here: these are the ones that public listings of its results name
([`harnesses/paper.py`](../../fastmmoe/harnesses/paper.py)); `--data` and `--tasks` take others.
"""


def command(model: str, name: str, table: PaperTable) -> str:
    environment = " --python .venv-vlmeval/bin/python" if table.harness == "vlmevalkit" else ""
    out = RESULTS.relative_to(ROOT) / model / name
    return f"fastmmoe eval --table {name} --model {MODELS[model]} --device cuda{environment} --out {out}"


def rows(table: PaperTable, names: list[str], study: Mapping[str, Any] | None) -> list[list[str]]:
    """Head and rows of a table; a run that is not there has empty cells."""
    runs = {} if study is None else {run["name"]: run for run in study["rows"]}
    dense = runs.get(DENSE)
    if runs and dense is None:
        raise ValueError(f"rows: expected a run named {DENSE!r}, got {', '.join(runs)}")
    columns = (
        [(task, metric) for task, metrics in dense["scores"].items() for metric in list(metrics)[:1]]
        if dense
        else [(task, "") for task in table.tasks]
    )
    found = [["run", *(f"{task} {metric}".strip() for task, metric in columns), "retained", "FLOPs", "first token"]]
    for name in dict.fromkeys((*names, *runs)):
        run = runs.get(name)
        if run is None:
            found.append([name, *[""] * (len(columns) + 3)])
            continue
        values = [run["scores"].get(task, {}).get(metric) for task, metric in columns]
        pairs = [(value, dense["scores"][task][metric]) for value, (task, metric) in zip(values, columns, strict=True)]
        shares = [value / of for value, of in pairs if value is not None and of]
        is_whole = len(shares) == len(columns)
        costs, of = run["costs"], dense["costs"]
        found.append(
            [
                name,
                *("" if value is None else f"{value:.4g}" for value in values),
                f"{sum(shares) / len(shares):.1%}" if is_whole else "",
                f"{costs['flops_ratio']:.2f}" if costs else "",
                _latency(costs, of),
            ]
        )
    return found


def _latency(costs: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """Of the dense model's in brackets, where both answered as many prompts."""
    name = "first_token_latency_s"
    if name not in costs:
        return ""
    is_like = name in dense and costs.get("answered") == dense.get("answered")
    return f"{costs[name] * 1e3:.1f} ms" + (f" ({costs[name] / dense[name]:.2f})" if is_like else "")


def section(model: str, results: Path) -> str:
    text = [f"## {model}\n"]
    for name, table in TABLES.items():
        path = results / model / name / "eval.json"
        study = json.loads(path.read_text()) if path.is_file() else None
        head, *others = rows(table, list(table.configs(model, ARCHITECTURES[model])), study)
        rule = ["---", *["---:"] * (len(head) - 1)]
        text.append(f"### {table.title[0].upper()}{table.title[1:]}\n\n`{command(model, name, table)}`\n")
        if study is not None:
            machine, versions = study["machine"], study["versions"]
            where = machine["gpu"] or machine["cpu"]
            text.append(f"{where}, {', '.join(f'{k} {v}' for k, v in versions.items())}, {study['date']}\n")
        text.append("\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *others)) + "\n")
    return "\n".join(text)


def page(results: Path = RESULTS) -> str:
    return "\n".join([HEAD, *(section(model, results) for model in MODELS)])


if __name__ == "__main__":
    PAGE.write_text(page())
