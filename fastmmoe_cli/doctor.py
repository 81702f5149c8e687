"""`fastmmoe doctor`: what this machine offers, as a table."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fastmmoe_cli.console import console, importing, print_json, refusing
from fastmmoe_cli.options import Json, check_model

EXAMPLE = "Example: fastmmoe doctor --json"


def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint directory or hub id, to say what it would take here, and not of all models."),
    ] = None,
    json: Json = False,
) -> None:
    """Tell what this machine offers to FastMMoE, what is missing, and how to get it."""
    if model is not None:
        check_model(model, option="--model ")
    with importing():
        from fastmmoe.families.checkpoint import read_config
        from fastmmoe_cli.machine import examine

    with refusing(OSError, ValueError, ImportError, before="--model: "):
        findings = examine(None if model is None else read_config(model))
    if json:
        print_json({"findings": [asdict(finding) for finding in findings]})
        return
    table = Table("", "", "found")
    table.add_column("to do", overflow="fold")
    for group, members in groupby(findings, lambda finding: finding.group):
        for finding in members:
            style = "" if finding.ok else "yellow"
            table.add_row(group, finding.name, escape(finding.found), escape(finding.advice), style=style)
            group = ""
        table.add_section()
    console.print(table)
