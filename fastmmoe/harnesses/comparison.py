"""Runs of a harness side by side, the dense model's first: a row per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LATENCIES = {"prefill_latency_s": "prefill", "first_token_latency_s": "first token"}


def columns(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table: a head, and a row per run; in brackets, FLOPs of the dense model's, and latencies of the first run's.

    Latencies are per prompt, in batches; those of runs that answered different numbers of prompts are not compared.

    Args:
        runs: each its `name`, `scores` (task -> metric -> number) and `costs` ({} where nothing was asked anew).
    """
    scores = [(task, metric) for task, metrics in runs[0]["scores"].items() for metric in metrics]
    rows = [["run", *(f"{task}: {metric}" for task, metric in scores), "FLOPs", *LATENCIES.values()]]
    first = runs[0]["costs"]
    for run in runs:
        costs, values = run["costs"], [run["scores"].get(task, {}).get(metric) for task, metric in scores]
        row = [run["name"], *("" if value is None else f"{value:.4f}" for value in values)]
        row.append(f"{costs['flops']:.3g} ({costs['flops_ratio']:.2f})" if costs else "")
        for name in LATENCIES:
            is_like = costs and first and costs["answered"] == first["answered"]
            ratio = f" ({costs[name] / first[name]:.2f})" if is_like else ""
            row.append(f"{costs[name] * 1e3:.1f} ms{ratio}" if costs else "")
        rows.append(row)
    return rows


def as_markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """The same in Markdown."""
    head, *rows = columns(runs)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, rule, *rows))
