"""`fastmmoe flops`: the cost of a prefill, by calculation."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

import fastmmoe
from fastmmoe.cli.console import console, print_json, refusing
from fastmmoe.cli.options import Json, Retention, prune_layers_option, read_layers, vision_top_k_option
from fastmmoe.cli.tables import span
from fastmmoe.families import ARCHITECTURES

EXAMPLE = (
    f"Example: fastmmoe flops {next(iter(ARCHITECTURES))} --text 100 --vision 1792 --vision-top-k 4 "
    "--prune-layers 5,8,12 --retention 0.5"
)


def flops(
    model: Annotated[str, typer.Argument(help=f"A checkpoint directory, or one of {', '.join(ARCHITECTURES)}.")],
    text: Annotated[int, typer.Option(min=0, help="Text tokens of the prompt.")] = 100,
    vision: Annotated[int, typer.Option(min=0, help="Vision tokens of the prompt.")] = 1792,
    vision_top_k: Annotated[int | None, vision_top_k_option("the model's")] = None,
    reduction_layer: Annotated[int, typer.Option(help="First layer that uses --vision-top-k.")] = 2,
    prune_layers: Annotated[str | None, prune_layers_option("none")] = None,
    retention: Retention = 1.0,
    json: Json = False,
) -> None:
    """Count a prefill's FLOPs, dense and with FastMMoE (the language model only), without loading any weights."""
    from transformers import AutoConfig

    from fastmmoe.families.processors import register_ports

    register_ports()

    with refusing(OSError, ValueError, TypeError):
        config = fastmmoe.FastMMoEConfig(
            vision_top_k=vision_top_k,
            reduction_layer=reduction_layer,
            prune_layers=read_layers(prune_layers) or (),
            retention=retention,
        )
        architecture = AutoConfig.from_pretrained(model) if Path(model).is_dir() else model
        report = fastmmoe.flops(architecture, text, vision, config)
    if json:
        question = {"model": model, "n_text": text, "n_vision": vision, "config": config.to_dict()}
        print_json({**question, **asdict(report)})
        return
    unit, name = (1e12, "TFLOPs") if report.dense >= 1e12 else (1e9, "GFLOPs")
    table = Table("layers", title=f"{model}: prefill of {text:,} text and {vision:,} vision tokens, in {name}")
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
    console.print(table)
