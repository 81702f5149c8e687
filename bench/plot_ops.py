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
from report_ops import about

COLORS = {
    "fastmmoe": "tab:blue", "torch": "tab:cyan", "naive loops": "tab:red", "transformers router": "tab:orange",
    "attention map": "tab:orange", "one row": "tab:green", "sort and histogram": "tab:orange",
    "grouped_mm": "tab:orange",
}  # fmt: skip
MOST_COLUMNS = 4


def draw(result: dict, path: Path) -> None:
    """`result` as `bench_ops.py` writes it."""
    names = list(dict.fromkeys(case["op"] for case in result["cases"]))
    rows = -(-len(names) // MOST_COLUMNS)
    columns = -(-len(names) // rows)
    figure = Figure(figsize=(4.0 * columns + 0.4, 3.7 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        draw_op(axes, name, [case for case in result["cases"] if case["op"] == name])
    for axes in panels[len(names) :]:
        axes.axis("off")
    machine = result["machine"]
    numbers = "" if result["interpreted"] else "; numbers: times as long as fastmmoe takes"
    figure.suptitle(
        f"ops, {result['dtype']}, {machine.get('gpu', machine['cpu'])}. {about(result)}\n"
        f"ceilings {result['ceilings']['source']}{numbers}",
        fontsize="medium",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_op(axes: Axes, name: str, cases: list[dict]) -> None:
    cases = sorted(cases, key=lambda case: (case["tokens"] * case["batch"], case["batch"]))
    whos = list(dict.fromkeys(who for case in cases for who in case["contestants"]))
    step = 0.8 / len(whos)
    is_tight = len(whos) * len(cases) > 9
    for number, who in enumerate(whos):
        color, label = COLORS[who], who
        for i, case in enumerate(cases):
            if who not in case["contestants"]:
                continue
            entry, x = case["contestants"][who], i - 0.4 + (number + 0.5) * step
            # on this axis the stem is how many times the roofline it takes
            axes.vlines(x, case["roofline_us"], entry["us"], color=color, linewidth=3, alpha=0.5)
            axes.plot(x, entry["us"], "o", color=color, markersize=5, label=label)
            label = ""
            if "speedup" in entry:
                axes.annotate(
                    ratio_text(entry["speedup"]), (x, entry["us"]), xytext=(0, 5), textcoords="offset points",
                    ha="center", fontsize="x-small", rotation=90 if is_tight else 0,
                )  # fmt: skip
    for i, case in enumerate(cases):
        axes.hlines(case["roofline_us"], i - 0.42, i + 0.42, color="0.2", label="" if i else "roofline")
    axes.set_yscale("log")
    low = min(case["roofline_us"] for case in cases)
    high = max(entry["us"] for case in cases for entry in case["contestants"].values())
    # room for the labels and the legend
    axes.set_ylim(low / 1.6, high * max(4.0, (high / low) ** 0.45))
    axes.yaxis.set_major_locator(LogLocator(numticks=12))
    axes.set_xticks(range(len(cases)), [f"{c['batch']} x {c['tokens']}" for c in cases], fontsize="small")
    axes.set_title(name, fontsize="medium")
    axes.set_xlabel("samples x tokens", fontsize="small")
    axes.set_ylabel("us")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize="x-small", ncols=2, loc="upper left")


def ratio_text(ratio: float) -> str:
    """Three digits."""
    return f"{ratio:.{max(0, 3 - len(str(int(ratio))))}f}x"


def main(
    json_path: Annotated[Path, typer.Argument(metavar="JSON", help="What bench_ops.py wrote.")],
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="Where to draw it.")],
) -> None:
    draw(json.loads(json_path.read_text()), picture)


if __name__ == "__main__":
    typer.run(main)
