"""Draw what `bench_prefill.py` found: time relative to the best dense variant over vision tokens, FLOPs beside.

    python bench/plot_prefill.py prefill.json break_even.json prefill.png

One panel per batch size, one line per variant; the dashed line of the same colour is its FLOPs. Files of one machine
may be drawn together; of the same case in two of them the first counts.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {
    "stock, grouped_mm": "0.3", "stock, eager": "0.6", "stock, our experts": "tab:brown",
    "experts only": "tab:orange", "prune only": "tab:green", "prune only, our experts": "tab:olive",
    "both": "tab:blue", "both, our experts": "tab:cyan",
}  # fmt: skip


def collect(results: list[dict]) -> dict[int, dict[int, dict[str, dict]]]:
    """Batch size -> vision tokens per sample, rising -> variant -> row; mixed batches have no place on the axis."""
    found: dict[int, dict[int, dict[str, dict]]] = {}
    for result in results:
        for case in result["cases"]:
            if not case["is_mixed"]:
                rows = {row["variant"]: row for row in case["variants"]}
                found.setdefault(case["batch"], {}).setdefault(case["vision_tokens"][0], rows)
    return {batch: dict(sorted(found[batch].items())) for batch in sorted(found)}


def draw(results: list[dict], path: Path) -> None:
    """`results` as `bench_prefill.py` writes them."""
    batches = collect(results)
    if not batches:
        raise SystemExit("nothing to draw: no case that is not mixed")
    figure = Figure(figsize=(6.4 * len(batches), 5.6), layout="constrained")
    panels = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
    for axes, (batch, cases) in zip(panels, batches.items(), strict=True):
        _draw_batch(axes, cases)
        axes.set(title=f"batch {batch}", xlabel="vision tokens per sample", ylabel="time / best dense")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    machine, model = results[0]["machine"], results[0]["model"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} thread(s)"
    figure.suptitle(f"prefill, {model['size']}, {model['dtype']}: {where}\ndashed: FLOPs / dense", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_batch(axes: Axes, cases: dict[int, dict[str, dict]]) -> None:
    for name in dict.fromkeys(name for rows in cases.values() for name in rows):
        tokens = [count for count, rows in cases.items() if name in rows]
        times = [cases[count][name]["ttft_over_best_dense"] for count in tokens]
        (line,) = axes.plot(tokens, times, marker="o", color=COLORS.get(name), label=name)
        flops = [cases[count][name]["flops_ratio"] for count in tokens]
        # once per method: its experts do not change the FLOPs
        if min(flops) < 1 and "our experts" not in name:
            axes.plot(tokens, flops, "--", color=line.get_color())
    axes.axhline(1, color="0.8", zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(cases), [str(count) for count in cases], fontsize="small")
    axes.minorticks_off()
    axes.set_ylim(0, None)
    axes.grid(alpha=0.3)


def main(
    json_paths: Annotated[list[Path], typer.Argument(metavar="JSON...", help="What bench_prefill.py wrote.")],
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="Where to draw it.")],
) -> None:
    draw([json.loads(path.read_text()) for path in json_paths], picture)


if __name__ == "__main__":
    typer.run(main)
