"""The command line as a whole: its subcommands in the order in which the help lists them."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Annotated

import typer
from typer.core import TyperGroup

from fastmmoe_cli import analyze, bench, calibrate, demo, doctor, evaluate, flops, run, serve, time
from fastmmoe_cli.console import fail, quiet

UsageError = typer.BadParameter.__base__  # typer has no public name for it


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        fail(error.format_message())


class Commands(TyperGroup):
    """Says what is wrong with options in one line, like everything else, and not in a box below the usage."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if not args:  # prints the help, by an error of the same kind
            return super().parse_args(ctx, args)
        with _in_one_line():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> object:
        with _in_one_line(), quiet():
            return super().invoke(ctx)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        try:
            typer.echo(metadata.version("fastmmoe"))
        except metadata.PackageNotFoundError:  # a checkout
            from fastmmoe import __version__

            typer.echo(__version__)
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def fastmmoe(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Faster prefill of multimodal mixture-of-experts models."""


app.command(epilog=demo.EXAMPLE)(demo.demo)
app.command(epilog=bench.EXAMPLE)(bench.bench)
app.command(epilog=run.EXAMPLE)(run.run)
app.command(epilog=serve.EXAMPLE)(serve.serve)
app.command(epilog=flops.EXAMPLE)(flops.flops)
app.command(epilog=time.EXAMPLE)(time.time)
app.command(epilog=analyze.EXAMPLE)(analyze.analyze)
app.command(epilog=calibrate.EXAMPLE)(calibrate.calibrate)
app.command("eval", cls=evaluate.ManyValues, epilog=evaluate.EXAMPLE)(evaluate.evaluate)
app.command(epilog=doctor.EXAMPLE)(doctor.doctor)
