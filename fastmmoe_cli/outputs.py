"""The files that a command writes: tried before any work, and written behind the figures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from fastmmoe_cli.console import fail, reason, stderr


def check_output(output: Path) -> None:
    """Check that a picture can be written there."""
    if output.suffix.lower() != ".png" or not output.parent.is_dir() or output.is_dir():
        fail(f"--output {output}: expected a .png file in a directory that exists")
    check_writable("--output", output)


def check_page(page: Path) -> None:
    """Check that a report can be written there."""
    if page.suffix.lower() not in (".html", ".htm") or not page.parent.is_dir() or page.is_dir():
        fail(f"--report {page}: expected a .html file in a directory that exists")
    check_writable("--report", page)


def check_writable(option: str, path: Path) -> None:
    """Check that a file can be opened to write; one that exists stays as it is, one that does not is gone again."""
    if path.is_fifo():  # to open one waits for a reader
        fail(f"{option} {path}: expected a file, got a pipe")
    try:
        target = path.resolve()  # of a link
        is_new = not target.exists()
        with target.open("ab"):
            pass
        if is_new:
            target.unlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: links that go round
        fail(f"{option} {path}: cannot be written: {getattr(error, 'strerror', None) or error}")


def ask_to_overwrite(said: str, kind: str) -> None:
    """Where an earlier run's results are, `said` in a sentence: overwrite them if the user says so.

    Args:
        kind: what else could be written to, a file or a directory.

    Raises:
        typer.Abort: the user says no.
        typer.Exit: nobody can be asked.
    """
    if not (sys.stdin.isatty() and stderr.is_terminal):
        fail(f"{said}; expected another {kind}, --resume to go on with it, or --overwrite")
    typer.confirm(f"{said}. Overwrite?", abort=True, err=True)


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Where a file cannot be written although it could be opened: say it behind the figures, and exit with code 1."""
    try:
        yield
    except OSError as error:
        fail(f"{option} {path}: could not be written: {error.strerror or reason(error)}", code=1)
