"""`fastmmoe flops`: the cost of a prefill, by calculation."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import Annotated

from rich.markup import escape
from rich.table import Table

from fastmmoe_cli.console import console, print_json, refusing
from fastmmoe_cli.options import (
    Json,
    ReductionLayer,
    Retention,
    Sizes,
    Text,
    Vision,
    prune_layers_option,
    read_reduction,
    vision_top_k_option,
)
from fastmmoe_cli.tables import NOTHING_REDUCED, span

EXAMPLE = (
    "Example: fastmmoe flops DIR --text 100 --vision 1792 --vision-top-k 4 "
    "--prune-layers 5,8,12 --retention 0.5"
)


def flops(
    model: Sizes,
    text: Text = 100,
    vision: Vision = 1792,
    vision_top_k: Annotated[int | None, vision_top_k_option("the model's")] = None,
    reduction_layer: ReductionLayer = 2,
    prune_layers: Annotated[str | None, prune_layers_option("the preset's")] = None,
    retention: Retention = 1.0,
    json: Json = False,
) -> None:
    """Count a prefill's FLOPs, dense and with FastMMoE (the language model only), without loading any weights."""
    with refusing(OSError, ValueError, TypeError, options=True):
        sizes, config = read_reduction(model, vision_top_k, reduction_layer, prune_layers, retention)
        from fastmmoe.cost.flops import flops as count

        report = count(sizes, text, vision, config)
    if json:
        question = {"model": model, "n_text": text, "n_vision": vision, "config": config.to_dict()}
        print_json({**question, **asdict(report)})
        return
    unit, name = (1e12, "TFLOPs") if report.dense >= 1e12 else (1e9, "GFLOPs")
    table = Table("layers", title=f"{escape(model)}: prefill of {text:,} text and {vision:,} vision tokens, in {name}")
    for column in ("attention tokens", "MoE tokens", "dense", "FastMMoE", "saved"):
        table.add_column(column, justify="right")
    for _, group in groupby(report.per_layer, lambda row: (row.attention_tokens, row.moe_tokens, row.reduced)):
        rows = list(group)
        dense, reduced = sum(row.dense for row in rows), sum(row.reduced for row in rows)
        tokens = f"{rows[0].attention_tokens:,}", f"{rows[0].moe_tokens:,}"
        figures = f"{dense / unit:.2f}", f"{reduced / unit:.2f}", f"{1 - reduced / dense:.1%}"
        table.add_row(span([row.layer for row in rows]), *tokens, *figures)
    table.add_section()
    figures = f"{report.dense / unit:.2f}", f"{report.reduced / unit:.2f}", f"{report.saved:.1%}"
    table.add_row("all", "", "", *figures, style="bold")
    table.caption = f"pruned at layers {', '.join(map(str, config.prune_layers))}" if config.prune_layers else None
    console.print(table)
    if report.reduced == report.dense:
        console.print(NOTHING_REDUCED, soft_wrap=True)
