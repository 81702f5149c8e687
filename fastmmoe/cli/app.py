"""The command line as a whole: its subcommands in the order in which the help lists them."""

import typer

from fastmmoe.cli import analyze, bench, demo, doctor, flops, run, serve, time

app = typer.Typer(
    help="Faster prefill of multimodal mixture-of-experts models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(epilog=demo.EXAMPLE)(demo.demo)
app.command(epilog=bench.EXAMPLE)(bench.bench)
app.command(epilog=run.EXAMPLE)(run.run)
app.command(epilog=serve.EXAMPLE)(serve.serve)
app.command(epilog=flops.EXAMPLE)(flops.flops)
app.command(epilog=time.EXAMPLE)(time.time)
app.command(epilog=analyze.EXAMPLE)(analyze.analyze)
app.command(epilog=doctor.EXAMPLE)(doctor.doctor)
