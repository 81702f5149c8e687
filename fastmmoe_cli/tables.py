"""Figures as tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from fastmmoe.report import PrefillReport
    from fastmmoe_cli.compare import Comparison

NOTHING_REDUCED = "Nothing is reduced: --vision-top-k, --retention and --prune-layers say what is."


def cost_table(result: Comparison) -> Table:
    """FLOPs and time, FastMMoE off and on."""
    counted = result.report.flops
    table = Table("prefill", title=f"{result.report.n_text[0]:,} text and {result.report.n_vision[0]:,} vision tokens")
    for name in ("FastMMoE off", "on", "saved"):
        table.add_column(name, justify="right")
    table.add_row("language model", _flops(counted.dense), _flops(counted.reduced), f"{counted.saved:.1%}")
    table.add_row(
        "time, vision tower included",
        f"{result.dense_prefill * 1e3:,.0f} ms",
        f"{result.fast_prefill * 1e3:,.0f} ms",
        f"{1 - result.fast_prefill / result.dense_prefill:.1%}",
    )
    table.caption = f"times: medians of {result.runs} alternating runs"
    return table


def token_table(report: PrefillReport) -> Table:
    """How many tokens of the first sample each layer's MoE saw."""
    table = Table("layers", title="tokens in the MoE")
    table.add_column("tokens", justify="right")
    tokens = [per_sample[0] for per_sample in report.tokens_per_layer]
    for count, group in groupby(range(len(tokens)), tokens.__getitem__):
        table.add_row(span(list(group)), f"{count:,}")
    return table


def stage_table(report: PrefillReport) -> Table:
    """What each prune stage did to the first sample's vision tokens."""
    table = Table("layer", title="vision tokens")
    for name in ("entering", "kept", "merged", "dropped"):
        table.add_column(name, justify="right")
    for stage in report.stages:
        counts = (stage.entering[0], stage.kept[0], stage.merged[0], stage.dropped[0])
        table.add_row(str(stage.layer), *(f"{count:,}" for count in counts))
    table.caption = "merged: one for each window"
    return table


def span(layers: Sequence[int]) -> str:
    """Layers in a row, by the first and the last."""
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"


def _flops(value: float) -> str:
    return f"{value / 1e12:.2f} TFLOPs" if value >= 1e12 else f"{value / 1e9:.2f} GFLOPs"
