"""Where a command writes: figures to stdout, progress and errors to stderr; bad input is one line and exit code 2."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# what a model or a file is called is no code for an emoji
console = Console(emoji=False)
stderr = Console(stderr=True, emoji=False)


def print_json(value: dict) -> None:
    typer.echo(json.dumps(value, indent=2))


def note(message: str) -> None:
    """Say on stderr what the user may not expect."""
    stderr.print(f"note: {escape(message)}", soft_wrap=True, highlight=False)


def fail(message: str, code: int = 2) -> NoReturn:
    """Say what is wrong in one line and exit; code 2 is for bad input, 1 for what fails later."""
    stderr.print(f"[bold red]error:[/] {escape(' '.join(message.splitlines()))}", soft_wrap=True)
    raise typer.Exit(code)


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def refusing(*kinds: type[Exception], before: str = "", options: bool = False) -> Iterator[None]:
    """Turn what bad input raises into one line and exit code 2; `before` is said in front of it.

    Args:
        options: what is refused was given as options and arguments, and is called as the user calls it.
    """
    try:
        yield
    except kinds as error:
        said = reason(error)
        fail(before + (PARAMETER.sub(lambda found: AS_TYPED[found[0]], said) if options else said))


# a parameter of Python, in front of an error about it -> what a user gave
AS_TYPED = {"text_config": "MODEL", "model_or_name": "MODEL"} | {
    name: f"--{name.replace('_', '-')}"
    for name in ("vision_top_k", "reduction_layer", "prune_layers", "retention", "alpha", "strategy", "keep_by")
}
PARAMETER = re.compile(rf"^(?:{'|'.join(AS_TYPED)})(?=[=:\[])")


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr, if that is a terminal; yields a function that names the step about to begin."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        # from -1: naming the first step has completed none
        task = bar.add_task(description, total=total, completed=-1 if total else 0)
        yield lambda step: bar.update(task, description=step, advance=1)


@contextmanager
def importing() -> Iterator[None]:
    """What is imported within takes seconds, the first time.

    Raises:
        typer.Exit: torchvision is another build than torch, and breaks transformers' imports.
    """
    try:
        with nullcontext() if "transformers" in sys.modules else progress("importing torch and transformers"):
            yield
    except (ImportError, RuntimeError, OSError) as error:
        if "torchvision" not in str(error):
            raise
        said = "torchvision does not fit torch: install both from one index, or uninstall torchvision"
        fail(f"{said} ({reason(error)})", code=1)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' warnings off stderr, and their progress bars where it is no terminal.

    They read the environment when they are imported, which takes seconds: what is refused before is not to wait.
    """
    if "transformers" in sys.modules:
        with _quiet_now():
            yield
        return
    wanted = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}
    wanted |= {} if stderr.is_terminal else {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextmanager
def _quiet_now() -> Iterator[None]:
    import transformers

    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    hides_bars = transformers.logging.is_progress_bar_enabled() and not stderr.is_terminal
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    if hides_bars:
        transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if hides_bars:
            transformers.logging.enable_progress_bar()
