"""Where a command writes: figures to stdout, progress and errors to stderr; bad input is one line and exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

console = Console()
stderr = Console(stderr=True)


def print_json(value: dict) -> None:
    typer.echo(json.dumps(value, indent=2))


def fail(message: str) -> NoReturn:
    """Say what is wrong in one line and exit with code 2."""
    stderr.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(2)


@contextmanager
def refusing(*kinds: type[Exception]) -> Iterator[None]:
    """Turn what bad input raises into one line and exit code 2."""
    try:
        yield
    except kinds as error:
        fail((str(error).strip() or type(error).__name__).splitlines()[0])


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr, if that is a terminal; yields a function that names the step about to begin."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        # from -1: naming the first step has completed none
        task = bar.add_task(description, total=total, completed=-1 if total else 0)
        yield lambda step: bar.update(task, description=step, advance=1)
