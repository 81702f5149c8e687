"""The study's pictures, one per part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmmoe.study.methods import CHOSEN, FACTORS, entries
from fastmmoe.study.prediction import SHOWN
from fastmmoe.study.results import read_parts
from fastmmoe.study.study import PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

DPI = 150
COLOURS = {entry.name: entry.colour for entry in entries()} | {CHOSEN: "tab:purple"}
MODALITIES = {"vision": "tab:blue", "text": "tab:orange"}


def draw_plots(out: Path) -> list[Path]:
    """Draw every part that is complete in a directory; the files written."""
    parts = read_parts(out, PARTS)
    rows = {part: result["rows"] for part, result in parts.items()}
    figures = {}
    if "methods" in rows:
        figures["methods"] = methods_figure([*rows["methods"], *rows.get("chosen", ())])
        if any(row["types"] for row in rows["methods"]):
            figures["types"] = types_figure(rows["methods"])
    if "heatmap" in rows:
        figures["heatmap"] = heatmap_figure(rows["heatmap"])
    if "routing" in rows:
        figures["routing"] = routing_figure(rows["routing"])
    if "magnitude" in rows:
        figures["magnitude"] = magnitude_figure(rows["magnitude"])
    if "ablations" in rows:
        figures["ablations"] = ablations_figure(rows["ablations"])
    if rows.get("budget"):  # some models allow none
        figures["budget"] = budget_figure(rows["budget"])
    if "timing" in rows:
        figures["timing"] = timing_figure(rows["timing"])
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=DPI)
    return [out / f"{name}.png" for name in figures]


def methods_figure(rows: Sequence[Row]) -> Figure:
    """Accuracy over FLOPs, a line per method through its retentions; a panel per placement, rows: experts."""
    placements = _unique(row["placement"] for row in rows)
    experts = _unique((row["vision_top_k"] for row in rows), keep_empty=True)
    figure, panels = _panels(len(experts), len(placements), 3.6, 3.2, sharey=True)
    dense = next((row for row in rows if row["config"] is None), None)
    for axes_row, top_k in zip(panels, experts, strict=True):
        for axes, placement in zip(axes_row, placements, strict=True):
            shown = [row for row in rows if (row["placement"], row["vision_top_k"]) == (placement, top_k)]
            for name in _unique(row["method"] for row in shown):
                line = sorted((row for row in shown if row["method"] == name), key=lambda row: row["flops_ratio"])
                axes.errorbar(*_xy(line, "flops_ratio", "accuracy"), yerr=[row["standard_error"] for row in line],
                              marker="o", markersize=4, capsize=2, color=COLOURS.get(name), label=name)  # fmt: skip
            if dense is not None:
                axes.axhline(dense["accuracy"], color="black", linewidth=0.8, linestyle="--", label="dense")
            layers = ", ".join(str(layer) for layer in shown[0]["prune_layers"]) if shown else ""
            which = "all experts" if top_k is None else f"K_v = {top_k}"
            axes.set(title=f"pruned at {layers} ({placement}), {which}", xlabel="FLOPs / dense")
            axes.title.set_fontsize("medium")
        axes_row[0].set_ylabel("exact match")
    _legend(figure, panels)
    return figure


def types_figure(rows: Sequence[Row]) -> Figure:
    """Accuracy by type of question, a quarter of the tokens left, all experts: a panel per placement."""
    dense = next(row for row in rows if row["config"] is None)
    names = list(dense["types"])
    retention = min((row["retention"] for row in rows), key=lambda share: abs(share - 0.25))
    shown = [row for row in rows if row["retention"] == retention and row["vision_top_k"] is None]
    placements = _unique(row["placement"] for row in shown)
    columns = min(2, len(placements))
    figure, panels = _panels(-(-len(placements) // columns), columns, 2.4 + 0.42 * len(names), 3.6, sharey=False)
    for axes in panels.flat[len(placements) :]:
        axes.set_axis_off()
    for axes, placement in zip(panels.flat, placements, strict=False):
        lines = [dense, *(row for row in shown if row["placement"] == placement)]
        table = np.array([[row["types"].get(name, np.nan) for name in names] for row in lines])
        labels = [f"{row['method']} ({row['accuracy']:.2f})" for row in lines]
        _matrix(axes, table, labels, names)
        axes.set_title(f"{placement}, {retention:g} left", fontsize="medium")
    return figure


def heatmap_figure(rows: Sequence[Row]) -> Figure:
    """Accuracy and FLOPs by first layer l_v and number of experts K_v."""
    words = "experts per vision token, K_v"
    return _experts_figure(rows, "vision_top_k", words, "FLOPs / dense", lambda row: row["flops_ratio"])


def budget_figure(rows: Sequence[Row]) -> Figure:
    """Accuracy and calculated time by first layer l_v and number of distinct experts B."""
    words, title = "distinct experts of vision tokens, B", f"{SHOWN}: calculated time / dense"

    def cost(row: Row) -> float:
        return row.get("time_ratio_predicted", {}).get(SHOWN, np.nan)  # an older study's rows lack it

    return _experts_figure(rows, "expert_budget", words, title, cost)


def _experts_figure(rows: Sequence[Row], column: str, words: str, title: str, cost: Callable[[Row], float]) -> Figure:
    """Accuracy, and a cost under its title, by first layer and number of experts in a column; the dense row first."""
    dense, rest = rows[0], rows[1:]
    layers = sorted({row["reduction_layer"] for row in rest})
    counts = sorted({row[column] for row in rest}, reverse=True)
    figure, panels = _panels(1, 2, 1.6 + 0.7 * len(layers), 1.6 + 0.6 * len(counts), sharey=False)
    for axes, value in zip(panels[0], (lambda row: row["accuracy"], cost), strict=True):
        cells = {(row[column], row["reduction_layer"]): value(row) for row in rest}
        table = np.array([[cells[count, layer] for layer in layers] for count in counts])
        _matrix(axes, table, [str(count) for count in counts], [str(layer) for layer in layers], digits=3)
        axes.tick_params(axis="x", rotation=0)
        axes.set(xlabel="first layer with fewer experts, l_v", ylabel=words)
    error = dense["standard_error"]
    panels[0, 0].set_title(f"exact match (dense {dense['accuracy']:.3f} ± {error:.3f})", fontsize="medium")
    panels[0, 1].set_title(title, fontsize="medium")
    return figure


def routing_figure(rows: Sequence[Row]) -> Figure:
    """Cosine of neighbours' routing, that of any pair, and the routing's entropy, per layer."""
    figure, panels = _panels(1, 2, 5.2, 3.6, sharey=False)
    for modality, colour in MODALITIES.items():
        for quantity, style in (("adjacent", "-"), ("any pair", ":")):
            _layer_line(panels[0, 0], rows, modality, quantity, colour, style)
        _layer_line(panels[0, 1], rows, modality, "entropy", colour, "-")
    panels[0, 0].set(title="routing similarity", xlabel="layer", ylabel="mean cosine")
    panels[0, 1].set(title="routing entropy", xlabel="layer", ylabel="nats")
    for axes in panels[0]:
        axes.legend(fontsize="small")
    return figure


def magnitude_figure(rows: Sequence[Row]) -> Figure:
    """V_m per layer."""
    figure, panels = _panels(1, 1, 5.6, 3.6, sharey=False)
    for modality, colour in MODALITIES.items():
        _layer_line(panels[0, 0], rows, modality, "stability", colour, "-")
    panels[0, 0].set(title="magnitude stability of expert outputs", xlabel="layer", ylabel="V_m = 1 - std / mean")
    panels[0, 0].legend(fontsize="small")
    return figure


def ablations_figure(rows: Sequence[Row]) -> Figure:
    """Accuracy on dev over each factor, a line per base; a row of panels per placement and retention."""
    rows = [row for row in rows if row["config"] is not None]
    places = _unique((row["placement"], row["retention"]) for row in rows)
    figure, panels = _panels(len(places), len(FACTORS), 3.2, 2.3, sharey="row")
    for axes_row, place in zip(panels, places, strict=True):
        here = [row for row in rows if (row["placement"], row["retention"]) == place]
        for axes, (factor, settings) in zip(axes_row, FACTORS.items(), strict=True):
            values = [changes[factor] for changes in settings]
            for base in _unique(row["method"] for row in here):
                line = _factor_line([row for row in here if row["method"] == base], factor)
                ticks, points = [values.index(value) for value in line], list(line.values())
                axes.errorbar(ticks, [row["accuracy"] for row in points], [row["standard_error"] for row in points],
                              marker="o", markersize=4, capsize=2, color=COLOURS.get(base), label=base)  # fmt: skip
            axes.set_xticks(range(len(values)), [str(value).replace("_", "\n") for value in values], fontsize="small")
            axes.set_title(f"{factor} ({place[0]}, {place[1]:g} left)", fontsize="medium")
        axes_row[0].set_ylabel("exact match on dev")
    _legend(figure, panels)
    return figure


def _factor_line(rows: Sequence[Row], factor: str) -> dict[Any, Row]:
    """Value of a factor -> the row of a base's rows, whichever factor it ran for."""
    (base,) = (row["config"] for row in rows if row["factor"] == "base")
    wanted = {changes[factor]: {**base, **changes} for changes in FACTORS[factor]}
    found = {value: [row for row in rows if row["config"] == config] for value, config in wanted.items()}
    return {value: matching[0] for value, matching in found.items() if matching}


def timing_figure(rows: Sequence[Row]) -> Figure:
    """Prefill time over FLOPs, a point per method, placement, retention and experts."""
    figure, panels = _panels(1, 1, 6.4, 4.8, sharey=False)
    axes = panels[0, 0]
    for name in _unique(row["method"] for row in rows):
        shown = [row for row in rows if row["method"] == name]
        axes.plot(*_xy(shown, "flops_ratio", "time_ratio"), "o", markersize=4, color=COLOURS.get(name), label=name)
    axes.plot((0, 1), (0, 1), color="0.6", linewidth=0.8, linestyle="--", label="time saved as FLOPs are")
    axes.set(xlabel="FLOPs / dense", ylabel="prefill time / dense", xlim=(0.2, 1.05))
    axes.legend(fontsize="small")
    return figure


def _layer_line(axes: Axes, rows: Sequence[Row], modality: str, quantity: str, colour: str, style: str) -> None:
    line = [row for row in rows if (row["modality"], row["quantity"]) == (modality, quantity)]
    errors = [row["standard_error"] or 0.0 for row in line]
    label = modality if quantity in ("entropy", "stability") else f"{modality}, {quantity}"
    axes.errorbar(*_xy(line, "layer", "mean"), yerr=errors, color=colour, linestyle=style, marker="o", markersize=4,
                  capsize=2, label=label)  # fmt: skip


def _panels(rows: int, columns: int, width: float, height: float, sharey: bool | str) -> tuple[Figure, np.ndarray]:
    """A figure and its axes [rows, columns]; `width` and `height` of one panel in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(width * columns, 5.6), height * rows + 0.6), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def _matrix(axes: Axes, table: np.ndarray, rows: Sequence[str], columns: Sequence[str], digits: int = 2) -> None:
    """A table of shares in 0..1 as coloured cells with their values."""
    numbers = table[np.isfinite(table)]
    low, high = (numbers.min(), numbers.max()) if len(numbers) else (0.0, 1.0)
    axes.imshow(table, aspect="auto", cmap="viridis", vmin=low, vmax=high)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right" if digits == 2 else "center")
    axes.set_yticks(range(len(rows)), rows)
    for (y, x), value in np.ndenumerate(table):
        if np.isfinite(value):
            colour = "white" if value <= (low + high) / 2 else "black"
            axes.text(x, y, f"{value:.{digits}f}", ha="center", va="center", fontsize=7, color=colour)


def _legend(figure: Figure, panels: np.ndarray) -> None:
    """One legend for all panels, each label once."""
    found = {}
    for axes in panels.flat:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, fontsize="small")


def _xy(rows: Sequence[Row], x: str, y: str) -> tuple[list, list]:
    return [row[x] for row in rows], [row[y] for row in rows]


def _unique(values: Any, keep_empty: bool = False) -> list:
    """Each value once, in order of appearance, empty ones only where they count as values."""
    return [value for value in dict.fromkeys(values) if value or keep_empty]
