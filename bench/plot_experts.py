"""Draw what `bench_experts.py` found: TFLOP/s of every case below its roofline, one panel per shape.

    python bench/plot_experts.py experts.json experts.png

`bench_experts.py --plot` draws the same.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY = {"ceiling": "0.6", "roofline": "0.2", "bmm": "0.5"}
COLORS = {"fastmmoe": "tab:blue", "grouped_mm": "tab:orange", "eager": "tab:red", "sonicmoe": "tab:purple",
          "liger": "tab:green"}  # fmt: skip
TILES = {64: "tab:blue", 128: "tab:orange"}
STYLES = ("-", "--", ":")


def draw(result: dict, path: Path) -> None:
    """`result` as `bench_experts.py` writes it; an estimate shows rooflines alone and says so."""
    names = list(dict.fromkeys(case["shape"] for case in result["cases"]))
    routings = list(dict.fromkeys(case["routing"] for case in result["cases"]))
    figure = Figure(figsize=(6.4 * len(names), 5.6), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        cases = [case for case in result["cases"] if case["shape"] == name]
        # from few to many pairs per expert
        order = sorted({(c["pairs_per_expert"], c["tokens"], c["top_k"]) for c in cases})
        for routing, style in zip(routings, STYLES, strict=False):
            _draw_routing(axes, [case for case in cases if case["routing"] == routing], order, routing, style)
        axes.axhline(result["ceilings"]["tflops"], color=GREY["ceiling"], linestyle="-.", label="large matmul")
        ticks = [f"{tokens} x {top_k}\n{pairs:.0f}" for pairs, tokens, top_k in order]
        axes.set_xticks(range(len(order)), ticks, fontsize="small")
        axes.set(title=f"shape {name}", ylabel="TFLOP/s", ylim=(0, None))
        axes.set_xlabel("tokens x experts per token, and pairs per expert")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    machine = result["machine"]
    source = result["ceilings"]["source"]
    where = f"{machine.get('gpu', machine['cpu'])}\nceilings {source}" if machine else source
    figure.suptitle(f"experts, {result['dtype']}: {where}", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_routing(axes: Axes, cases: list[dict], order: list[tuple], routing: str, style: str) -> None:
    cases = sorted(cases, key=lambda c: (c["pairs_per_expert"], c["tokens"], c["top_k"]))
    x = [order.index((c["pairs_per_expert"], c["tokens"], c["top_k"])) for c in cases]

    def line(values: list[float], color: str, label: str, **options) -> None:
        axes.plot(x, values, style, color=color, label=f"{label}, {routing}", **options)

    line([c["roofline_tflops"] for c in cases], GREY["roofline"], "roofline")
    if not any("contestants" in case for case in cases):
        for rows, color in TILES.items():
            line([c[f"padded_{rows}_roofline_tflops"] for c in cases], color, f"{rows}-row tiles")
    else:
        # both GEMMs, of which gate_up is two thirds; without combine
        rates = [3 / (2 / c["bmm"]["gate_up"]["tflops"] + 1 / c["bmm"]["down"]["tflops"]) for c in cases]
        line(rates, GREY["bmm"], "torch.bmm")
    for name, color in COLORS.items():
        if all(name in case.get("contestants", {}) for case in cases):
            line([c["contestants"][name]["tflops"] for c in cases], color, name, marker="o")


def main(
    json_path: Annotated[Path, typer.Argument(metavar="JSON", help="What bench_experts.py wrote.")],
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="Where to draw it.")],
) -> None:
    draw(json.loads(json_path.read_text()), picture)


if __name__ == "__main__":
    typer.run(main)
