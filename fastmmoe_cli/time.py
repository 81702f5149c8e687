"""`fastmmoe time`: the time of a prefill, by calculation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fastmmoe_cli.console import console, fail, importing, print_json, refusing
from fastmmoe_cli.extras import need
from fastmmoe_cli.options import (
    Json,
    ReductionLayer,
    Retention,
    Sizes,
    Text,
    Vision,
    check_retention,
    complete_from,
    prune_layers_option,
    read_reduction,
    vision_top_k_option,
)
from fastmmoe_cli.outputs import check_output, writing
from fastmmoe_cli.tables import NOTHING_REDUCED, span

if TYPE_CHECKING:
    from fastmmoe.cost.prefill_time import TimeReport
    from fastmmoe.cost.sweep import Outlook

EXAMPLE = (
    "Example: fastmmoe time DIR --device h100 --text 100 --vision 1792 --vision-top-k 4 "
    "--prune-layers 5,8,12 --retention 0.5"
)
DEVICES = ("h100", "h200", "a100", "l40s", "mi300x", "cpu")
DEVICE = f"{', '.join(DEVICES)} (measured in half a second), or a .json file of measured ceilings."
NOTE = (
    "Floors by calculation, not measurements: a prefill in eager mode takes longer, and the ratio may be another. "
    "Elementwise ops, which a compiler may fuse, are counted as eager mode runs them."
)

Sweep = Mapping[int, Sequence[float]]


def time(
    model: Sizes,
    device: Annotated[str, typer.Option(help=DEVICE, autocompletion=complete_from(DEVICES))] = "h100",
    text: Text = 100,
    vision: Vision = 1792,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Prompts of this size in the batch.")] = 1,
    vision_top_k: Annotated[int | None, vision_top_k_option("the model's")] = None,
    reduction_layer: ReductionLayer = 2,
    prune_layers: Annotated[str | None, prune_layers_option("the preset's")] = None,
    retention: Retention = 1.0,
    output: Annotated[Path | None, typer.Option(help="PNG to draw the speedup over tokens and batch in.")] = None,
    json: Json = False,
) -> None:
    """Calculate the floor of a prefill's time, dense and with FastMMoE (the language model only), and where it pays."""
    if output:
        need("demo", "matplotlib")
        check_output(output)
    if not device.endswith(".json") and device not in DEVICES:
        fail(f"--device {device}: expected one of {', '.join(DEVICES)} or a .json file of ceilings")
    if device.endswith(".json") and not Path(device).is_file():
        fail(f"--device {device}: No such file")
    check_retention(retention)
    with importing():
        from fastmmoe.cost.devices import ceilings_of
        from fastmmoe.cost.prefill_time import prefill_time
        from fastmmoe.cost.sweep import BATCHES, outlook, sweep
        from fastmmoe.cost.tokens import count_tokens

    with refusing(OSError, ValueError, TypeError, options=True):
        sizes, config = read_reduction(model, vision_top_k, reduction_layer, prune_layers, retention)
        # what can be refused is, before a CPU is measured
        architecture = count_tokens(sizes, text, vision, config).architecture
        ceilings = ceilings_of(device)
    report = prefill_time(architecture, [text] * batch, [vision] * batch, config, ceilings)
    outcome = outlook(architecture, text, vision, batch, config, ceilings)
    found = sweep(architecture, text, config, ceilings)
    if json:
        question = {"model": model, "device": device, "n_text": text, "n_vision": vision, "batch": batch}
        pays = {"batches": BATCHES, "speedups": found}
        print_json(
            {**question, "config": config.to_dict(), **asdict(report), "outlook": asdict(outcome), "sweep": pays}
        )
    else:
        title = f"{model} on {ceilings.name}: prefill of {batch} x ({text:,} text and {vision:,} vision tokens), in ms"
        console.print(layer_table(report, escape(title)))
        if report.reduced == report.dense:
            console.print(NOTHING_REDUCED, soft_wrap=True)
        else:
            console.print(sentence(report.speedup, outcome), soft_wrap=True, highlight=False)
            console.print(sweep_table(found, text))
        console.print(NOTE, soft_wrap=True)
        console.print(f"Ceilings: {escape(ceilings.source)}.", soft_wrap=True, highlight=False)
    if output:
        with writing("--output", output):
            draw(output, f"{model} on {ceilings.name}, {text:,} text tokens", found)
        if not json:
            console.print(f"picture: {escape(str(output))}", soft_wrap=True)


def sentence(speedup: float, outcome: Outlook) -> str:
    """What to expect, what binds, and what would give more."""
    said = f"x{speedup:.2f} expected: the {outcome.binds} bind"
    if outcome.batch is None:
        return f"{said}; larger batches would give little more."
    tokens = f" or {outcome.vision_tokens:,} vision tokens" if outcome.vision_tokens else ""
    return f"{said}; batch {outcome.batch}{tokens} would give x{outcome.speedup:.2f}."


def layer_table(report: TimeReport, title: str) -> Table:
    """Layers in a row that take the same time, together."""
    from fastmmoe.cost.sweep import binding

    table = Table("layers", title=title)
    for column in ("attention tokens", "MoE tokens", "dense", "FastMMoE", "speedup"):
        table.add_column(column, justify="right")
    table.add_column("what binds")
    rows = groupby(report.per_layer, lambda row: (row.attention_tokens, row.moe_tokens, row.dense, row.reduced))
    for (attention, moe, _, _), group in rows:
        layers = list(group)
        dense, reduced = sum(row.dense for row in layers), sum(row.reduced for row in layers)
        figures = f"{dense * 1e3:.2f}", f"{reduced * 1e3:.2f}", f"x{dense / reduced:.2f}"
        binds = binding([op for row in layers for op in row.reduced_ops])
        table.add_row(span([row.layer for row in layers]), f"{attention:,}", f"{moe:,}", *figures, binds)
    table.add_section()
    figures = f"{report.dense * 1e3:.2f}", f"{report.reduced * 1e3:.2f}", f"x{report.speedup:.2f}"
    table.add_row("all", "", "", *figures, "", style="bold")
    return table


def sweep_table(found: Sweep, text: int) -> Table:
    """Speedups over tokens and batch."""
    from fastmmoe.cost.sweep import BATCHES

    table = Table("vision tokens", title=f"speedup, by calculation, with {text:,} text tokens per sample")
    for batch in BATCHES:
        table.add_column(f"batch {batch}", justify="right")
    for vision, speedups in found.items():
        table.add_row(f"{vision:,}", *(f"x{speedup:.2f}" for speedup in speedups))
    return table


def draw(path: Path, title: str, found: Sweep) -> None:
    """A line per batch size over the vision tokens."""
    from matplotlib.figure import Figure

    from fastmmoe.cost.sweep import BATCHES

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for batch, speedups in zip(BATCHES, zip(*found.values(), strict=True), strict=True):
        axes.plot(list(found), speedups, marker="o", label=f"batch {batch}")
    axes.axhline(1, color="0.8", zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(found), [f"{vision:,}" for vision in found], fontsize="small")
    axes.minorticks_off()
    axes.set_title(f"{title}\nfloors by calculation, not measured", parse_math=False)
    axes.set(xlabel="vision tokens per sample", ylabel="speedup")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
