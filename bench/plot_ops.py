"""Draw what `bench_ops.py` found: the time of every contestant above the roofline, one panel per op.

    python bench/plot_ops.py ops.json ops.png

`bench_ops.py --plot` draws the same.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

COLORS = {
    "fastmmoe": "tab:blue", "torch": "tab:cyan", "naive loops": "tab:red", "transformers router": "tab:orange",
    "attention map": "tab:orange", "one row": "tab:green", "sort and histogram": "tab:orange",
    "grouped_mm": "tab:orange",
}  # fmt: skip
COLUMNS = 4


def draw(result: dict, path: Path) -> None:
    """`result` as `bench_ops.py` writes it."""
    names = list(dict.fromkeys(case["op"] for case in result["cases"]))
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.0 * columns + 0.4, 3.7 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        draw_op(axes, name, [case for case in result["cases"] if case["op"] == name])
    for axes in panels[len(names) :]:
        axes.axis("off")
    machine = result["machine"]
    backend = "Triton's interpreter" if result["interpreted"] else f"{result['backend']} backend"
    figure.suptitle(
        f"ops, {result['dtype']}, fastmmoe's {backend}: {machine.get('gpu', machine['cpu'])}\n"
        f"ceilings {result['ceilings']['source']}",
        fontsize="medium",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_op(axes: Axes, name: str, cases: list[dict]) -> None:
    cases = sorted(cases, key=lambda case: (case["tokens"] * case["batch"], case["batch"]))
    whos = list(dict.fromkeys(who for case in cases for who in case["contestants"]))
    width = 0.8 / len(whos)
    for number, who in enumerate(whos):
        x, us = zip(*((i, c["contestants"][who]["us"]) for i, c in enumerate(cases) if who in c["contestants"]))
        left = [i - 0.4 + number * width for i in x]
        bars = axes.bar(left, us, width, align="edge", color=COLORS[who], label=who)
        if who == "fastmmoe":
            continue
        speedups = [case["contestants"].get(who, {}).get("speedup") for case in cases]
        labels = ["" if s is None else f"{s:.3g}x" for s in (speedups[i] for i in x)]
        axes.bar_label(bars, labels, fontsize="xx-small", rotation=90 if len(whos) * len(cases) > 9 else 0, padding=2)
    for i, case in enumerate(cases):
        axes.hlines(case["roofline_us"], i - 0.44, i + 0.44, color="0.2", label="" if i else "roofline")
    axes.set_yscale("log")
    low = min(case["roofline_us"] for case in cases)
    high = max(entry["us"] for case in cases for entry in case["contestants"].values())
    # room for the labels
    axes.set_ylim(low / 1.6, high * (high / low) ** 0.25 * 1.5)
    axes.yaxis.set_major_locator(LogLocator(numticks=12))
    axes.set_xticks(range(len(cases)), [f"{c['batch']} x {c['tokens']}" for c in cases], fontsize="small")
    axes.set_title(name, fontsize="medium")
    axes.set_ylabel("us")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize="x-small", ncols=2, loc="upper left")


def main(
    json_path: Annotated[Path, typer.Argument(metavar="JSON", help="What bench_ops.py wrote.")],
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="Where to draw it.")],
) -> None:
    draw(json.loads(json_path.read_text()), picture)


if __name__ == "__main__":
    typer.run(main)
