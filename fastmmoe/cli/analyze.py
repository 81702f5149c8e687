"""`fastmmoe analyze`: the study of what the reductions cost in right answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from fastmmoe.cli.console import console, print_json, refusing
from fastmmoe.cli.extras import need
from fastmmoe.cli.options import Device, Dtype, Json, NewTokens, read_device

EXAMPLE = "Example: fastmmoe analyze --out results --workers 2 --resume"


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
            help="Some of methods, heatmap, routing, magnitude, ablations, chosen, timing, with commas between.",
            show_default="all that have questions",
        ),
    ] = None,
    n: Annotated[int, typer.Option(min=2, help="Questions to report on.")] = 2000,
    dev_n: Annotated[int, typer.Option(min=2, help="Questions to choose settings by.")] = 1000,
    split: Annotated[Literal["dev", "test"], typer.Option(help="Which scenes to report on.")] = "test",
    seed: Annotated[int, typer.Option(min=0, help="Other scenes for other seeds.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each process.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the work.")] = 1,
    resume: Annotated[bool, typer.Option(help="Go on with the rows that are in --out.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Prompts per forward.")] = 64,
    max_new_tokens: NewTokens = 8,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Study what the reductions cost in right answers: methods, layers, ablations, FLOPs and times, with plots."""
    need("study", "PIL", "matplotlib", "tqdm", *(() if data else ("sklearn", "skimage")))
    from fastmmoe.study import plots, study, tables

    settings = study.Settings(
        model=model, data=data, dev_data=dev_data, split=split, n=n, dev_n=dev_n, seed=seed, threads=threads,
        batch=batch, max_new_tokens=max_new_tokens, device=str(read_device(device)), dtype=dtype,
    )  # fmt: skip
    chosen = settings.default_parts if parts is None else [part.strip() for part in parts.split(",") if part.strip()]
    with refusing(OSError, ValueError, TypeError):
        work = study.Study(settings, out, chosen, resume=resume)
    work.run(workers)
    written = [*tables.write_tables(out), *plots.draw_plots(out)]
    if json:
        hidden = ("right",)  # one digit per question
        figures = {
            part: [{name: value for name, value in row.items() if name not in hidden} for row in file.rows]
            for part, file in work.files.items()
        }
        print_json({"out": str(out), "parts": figures})
        return
    for path in [*(file.path for file in work.files.values()), *written]:
        console.print(escape(str(path)), soft_wrap=True)
