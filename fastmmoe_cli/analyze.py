"""`fastmmoe analyze`: the study of what the reductions cost in right answers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from fastmmoe_cli.console import console, fail, importing, note, print_json, reason, refusing
from fastmmoe_cli.extras import need
from fastmmoe_cli.options import Device, Dtype, Json, NewTokens, read_device
from fastmmoe_cli.outputs import ask_to_overwrite, check_writable, writing

EXAMPLE = "Example: fastmmoe analyze --out results --workers 2 --resume"
PARTS = ("methods", "heatmap", "routing", "magnitude", "ablations", "chosen", "budget", "timing")
ANSWERED = ("methods", "heatmap", "chosen")  # parts whose rows are answers to the questions reported on


def analyze(
    out: Annotated[Path, typer.Option(help="Directory for the results: JSON, CSV, Markdown tables, plots.")],
    model: Annotated[
        str | None, typer.Option(help="Checkpoint directory or hub id.", show_default="the package's own")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Your questions: JSONL with image, question, answer[, type]; default: generated scenes."),
    ] = None,
    dev_data: Annotated[Path | None, typer.Option(help="Other questions, to choose settings by, likewise.")] = None,
    parts: Annotated[
        str | None,
        typer.Option(
            help=f"Some of {', '.join(PARTS)}, with commas between.",
            show_default="all that have questions",
        ),
    ] = None,
    n: Annotated[int, typer.Option(min=2, help="Questions to report on.")] = 2000,
    dev_n: Annotated[int, typer.Option(min=2, help="Questions to choose settings by.")] = 1000,
    split: Annotated[Literal["dev", "test"], typer.Option(help="Which scenes to report on.")] = "test",
    seed: Annotated[int, typer.Option(min=0, help="Other scenes for other seeds.")] = 0,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads of each process.")] = 1,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Processes that share the work.")] = 1,
    resume: Annotated[bool, typer.Option(help="Go on with the rows that are in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where --out holds results.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Prompts per forward.")] = 64,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            "--config",
            help="Settings in a file, as `fastmmoe calibrate` or config.to_dict() gives them: compare them, too.",
        ),
    ] = None,
    max_new_tokens: NewTokens = 8,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Study what the reductions cost in right answers: methods, layers, ablations, FLOPs and times, with plots."""
    need("study", "PIL", "matplotlib", "tqdm", *(() if data else ("sklearn", "skimage")))
    if resume and overwrite:
        fail("--overwrite: expected it or --resume, got both")
    asked_parts = [part.strip() for part in parts.split(",") if part.strip()] if parts is not None else list(PARTS)
    if unknown := [part for part in asked_parts if part not in PARTS]:
        fail(f"--parts: unknown {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
    if not asked_parts:
        fail(f"--parts: expected some of {', '.join(PARTS)}, got none")
    for option, path in {"--data": data, "--dev-data": dev_data, "--calibration": calibration}.items():
        if path is not None and not path.is_file():
            fail(f"{option} {path}: cannot be read: No such file")
    if os.path.lexists(out) and not out.is_dir():
        fail(f"--out {out}: cannot be written: {out}: Not a directory")
    with importing():
        from fastmmoe.study import plots, study, tables

    settings = study.Settings(
        model=model, data=data, dev_data=dev_data, split=split, n=n, dev_n=dev_n, seed=seed, threads=threads,
        batch=batch, max_new_tokens=max_new_tokens, calibration=calibration, device=str(read_device(device)),
        dtype=dtype,
    )  # fmt: skip
    chosen = settings.default_parts if parts is None else asked_parts
    check_out(out, chosen, resume, overwrite)
    with refusing(OSError, ValueError, TypeError, ImportError):
        work = study.Study(settings, out, chosen, resume=resume)
    problem = None
    if data is None and any(not file.is_complete for file in work.files.values()):
        asked = f"{settings.n:,} questions" + (f", {settings.dev_n:,} to choose by" if "ablations" in chosen else "")
        note(f"works on generated scenes ({asked}); --data asks yours, --n fewer, --parts less")
    try:
        work.run(workers, begin)
    except OSError as error:
        problem = f"{reason(error)}; {out} holds the rows up to then, --resume goes on with them"
    if json:
        hidden = ("right",)  # one digit per question
        figures = {
            part: [{name: value for name, value in row.items() if name not in hidden} for row in file.rows]
            for part, file in work.files.items()
        }
        print_json({"out": str(out), "parts": figures})
    if problem:
        fail(problem, code=1)
    with writing("--out", out):
        written = [*tables.write_tables(out), *plots.draw_plots(out)]
    if not json:
        if rows := [row for part in ANSWERED if part in work.files for row in work.files[part].rows]:
            console.print(frontier_table(rows))
        for path in [*(file.path for file in work.files.values()), *written]:
            console.print(escape(str(path)), soft_wrap=True)


def begin(part: str) -> None:
    """Say what is under way; where it is no terminal, no bar does."""
    from fastmmoe.study import study

    note(f"{part}: {study.PARTS[part]}")


def frontier_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """What to choose from, of a study's rows."""
    from fastmmoe.study.tables import frontier

    table = Table("method", title="dense, and what answers best for its FLOPs")
    for name in ("layers", "tokens left", "experts", "exact match", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in frontier(rows):
        table.add_row(
            escape(row["method"]),
            ", ".join(map(str, row["prune_layers"])),
            f"{row['retention']:g}" if row["placement"] else "all",
            "all" if row["vision_top_k"] is None else f"{row['vision_top_k']} from {row['reduction_layer']}",
            f"{row['accuracy']:.3f} ± {row['standard_error']:.3f}",
            f"{row['flops_ratio']:.2f}",
        )
    table.caption = (
        "experts per vision token, and from which layer on; ± standard error, of these questions alone; FLOPs / dense"
    )
    return table


def check_out(out: Path, parts: Sequence[str], resume: bool, overwrite: bool) -> None:
    """Check that a study can be written there, and that an earlier one's rows stay or go as the user says.

    Raises:
        typer.Abort: the user says no.
        typer.Exit: it cannot be written, or nobody can be asked.
    """
    folder = next(folder for folder in (out, *out.absolute().parents) if os.path.lexists(folder))
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fail(f"--out {out}: cannot be written: {folder}: {error.strerror}")
    names = [f"{part}.{kind}" for part in (*PARTS, "types") for kind in ("json", "csv", "json.partial", "png")]
    for path in [out / name for name in (*names, "comparisons.csv", "tables.md")]:
        if path.exists():
            check_writable("--out", path)
    held = ", ".join(part for part in parts if (out / f"{part}.json").exists())
    if not held or resume or overwrite:
        return
    ask_to_overwrite(f"--out {out}: holds an earlier run's {held}", "directory")
