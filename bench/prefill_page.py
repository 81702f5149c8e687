"""Print the prefill table of `docs/results/cpu.md`, out of `bench_prefill.py`'s result file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results/cpu/prefill_skipping.json"


def as_markdown(result: dict[str, Any]) -> str:
    """The first case's table, and what ran it."""
    case = result["cases"][0]
    names = {
        "stock, grouped_mm": "stock transformers, `grouped_mm` experts (its default)",
        "stock, eager": "stock transformers, eager experts",
        "stock, our experts": "stock transformers, this package's experts: the best dense one",
        "experts only": "fewer experts only",
        "prune only": "pruning only",
        "both": "both",
        "both, our experts": "both, this package's experts in the other layers too",
        "skip 50%": "experts skipped by need, 50 %",
        "skip 80%": "experts skipped by need, 80 %",
    }
    rows = {row["variant"]: row for row in case["variants"]}
    columns = "time / stock", "time / best dense", "FLOPs / dense", "time saved per FLOPs saved", "memory / stock"
    lines = [f"| | {' | '.join(columns)} | decode step / stock |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name, shown in names.items():
        row = rows[name]
        saved = row["time_saved_per_flops_saved"]
        cells = [
            f"{row['ttft_over_stock']:.2f}", f"{row['ttft_over_best_dense']:.2f}", f"{row['flops_ratio']:.3f}",
            "" if saved is None else f"{saved:.2f}", f"{row['peak_over_stock']:.2f}", f"{row['tpot_over_stock']:.2f}",
        ]  # fmt: skip
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    stock = rows["stock, grouped_mm"]
    return "\n".join(lines) + (
        f"\n\nStock takes {stock['ttft_seconds']:.1f} s and {stock['tpot_seconds'] * 1e3:.0f} ms per decode step. "
        f"{_where(result)}, {case['rounds']} rounds in which all take turns: `{result['command']}`."
    )


def _where(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}" if "threads" in machine else ""
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return ", ".join(filter(None, (machine.get("cpu"), threads, shown, result["date"])))


if __name__ == "__main__":
    print(as_markdown(json.loads(RESULT.read_text())))
