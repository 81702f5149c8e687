"""What became of a run of VLMEvalKit: scores, failures, costs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmeval.smp.status_report import collect_run_benchmark_report

from fastmmoe.harnesses.answers import Costs

STATUS = "status.json"
COSTS = "costs*.jsonl"  # a file per process, a line per answer
SKIPPED_AS_ASKED = "mode_infer"


def outcome(folder: Path, datasets: Sequence[str]) -> dict[str, Any]:
    """Read a run's folder.

    Returns:
        `scores`: data set -> metric -> number, of the metrics that VLMEvalKit takes for its score; `metrics`: all of
        them, None where one is not finite; `failures`: data set -> why it has no score; `costs`: per prompt, of all
        answers.
    """
    status = json.loads((folder / STATUS).read_text(encoding="utf-8"))["datasets"]
    report = {row["benchmark"]: row for row in collect_run_benchmark_report(folder)}
    found: dict[str, Any] = {"scores": {}, "metrics": {}, "failures": {}}
    for dataset in datasets:
        metrics = _numbers(status.get(dataset, {}).get("metrics") or {})
        why = _failure(status.get(dataset, {}), report.get(dataset, {}))
        if why == SKIPPED_AS_ASKED:
            continue
        if why or not metrics:
            found["failures"][dataset] = why or "has no score; what VLMEvalKit printed says why"
            continue
        found["metrics"][dataset] = metrics
        found["scores"][dataset] = _primary(report[dataset]) or metrics
    return found | {"costs": read_costs(folder, datasets).per_prompt()}


def read_costs(folder: Path, datasets: Sequence[str]) -> Costs:
    """The sum over questions; of one that was asked more than once, the last time."""
    spent: dict[tuple[str, str], Costs] = {}
    for path in sorted(folder.glob(COSTS)):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
            except ValueError:  # the process was killed in it
                continue
            asked = values.pop("dataset"), values.pop("question")
            spent[asked] = Costs(**values)
    return sum((costs for (dataset, _), costs in spent.items() if dataset in datasets), Costs())


def _failure(entry: Mapping[str, Any], row: Mapping[str, Any]) -> str | None:
    if why := entry.get("error_message") or entry.get("skip_reason"):
        return why
    if entry.get("status") != "done":
        return f"was stopped ({entry.get('status', 'not begun')})"
    for kind, of in (("infer", "questions have no answer"), ("judge", "answers were not judged")):
        if row.get(f"{kind}_failed"):
            return f"{row[f'{kind}_failed']} of {row[f'{kind}_total']} {of}"
    return None


def _primary(row: Mapping[str, Any]) -> dict[str, float | None]:
    names, values = row["primary_metric"], row["primary_metric_value"]
    return _numbers(values if isinstance(values, Mapping) else {str(names): values})


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    return {
        name: value if math.isfinite(value) else None
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
