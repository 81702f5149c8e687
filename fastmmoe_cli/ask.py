"""What `run` and `bench` share: ask a model about pictures with FastMMoE off and on, and show what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

import fastmmoe
from fastmmoe.families.chat import build_inputs
from fastmmoe.report import time_line
from fastmmoe_cli.compare import Comparison, compare
from fastmmoe_cli.console import console, fail, print_json, progress, refusing
from fastmmoe_cli.outputs import writing
from fastmmoe_cli.tables import cost_table, stage_table, token_table

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel

    from fastmmoe.families.videos import Video
    from fastmmoe.methods import FastMMoEConfig

NO_TIME_SAVED = (
    "No time was saved in these runs. With few tokens, or a small model, what a layer costs whatever it computes "
    "outweighs the FLOPs; other work on the machine disturbs the times. "
    "`fastmmoe time MODEL --retention 0.5` calculates from how many tokens on it pays."
)


def ask(
    model: PreTrainedModel,
    processor: Any,
    images: Sequence[Image],
    prompt: str,
    config: FastMMoEConfig,
    max_new_tokens: int,
    output: Path | None,
    videos: Sequence[Video] = (),
    page: Path | None = None,
) -> tuple[Comparison, Callable[[Any], None] | None]:
    """Refuse everything that can be refused, and ask both ways.

    Args:
        output, page: where a picture and a report are wanted.

    Returns:
        (what came of it, what draws the picture to a file if one is wanted and there is something to draw).

    Raises:
        typer.Exit: what is asked for cannot be done; it is said why.
    """
    with refusing(ValueError, TypeError):
        # an unsupported model or a layer it does not have, before any work is done
        with fastmmoe.enabled(model, config):
            pass
        inputs = build_inputs(model, processor, images, prompt, videos)
        tilings = None
        if output or page:
            from fastmmoe.families import processors

            try:
                tilings = processors.tilings(model.config, processor, images, inputs)
            except ValueError:  # it is not known which token is where: a report has the pictures alone
                if output:
                    raise
    runs = 5 if model.device.type == "cuda" else 3
    with progress("", total=2 + runs) as step:
        try:
            result = compare(model, processor, inputs, config, max_new_tokens=max_new_tokens, runs=runs, step=step)
        except (RuntimeError, ValueError) as error:
            # not every model takes images beside a video, any number of frames, or every dtype on every device
            option = "--video" if videos else "--model"
            fail(f"{option}: {type(model).__name__} refuses this prompt: {(str(error) or repr(error)).splitlines()[0]}")
    if tilings is None or not result.report.stages:
        return result, None
    from fastmmoe_cli.picture import draw_fate

    return result, partial(draw_fate, images=images, tilings=tilings, report=result.report)


def show(
    model: str,
    question: str,
    images: Sequence[Image],
    result: Comparison,
    output: Path | None,
    json: bool,
    draw: Callable[[Any], None] | None = None,
    page: Path | None = None,
) -> None:
    """Print a comparison, then draw; `output` and `page` are where a picture and a report were wanted.

    Raises:
        typer.Exit: the picture could not be written; the figures are printed.
    """
    report = result.report
    time = report.time() if report.device else None
    if json:
        floor = time and {"device": time.ceilings.name, "dense": time.dense, "fastmmoe": time.reduced}
        drawn = str(output) if output and draw else None
        written = {"picture": drawn} | ({"page": str(page)} if page else {})
        print_json({"model": model, **result.to_dict(), "calculated_floor_seconds": floor, **written})
    else:
        console.print(cost_table(result))
        if result.fast_prefill >= result.dense_prefill:
            console.print(NO_TIME_SAVED, soft_wrap=True)
        if time:
            console.print(time_line(time), soft_wrap=True, highlight=False)
        console.print(token_table(report))
        if report.stages:
            console.print(stage_table(report))
        console.print("[bold]off:[/]", escape(result.dense_answer), soft_wrap=True)
        console.print("[bold]on: [/]", escape(result.fast_answer), soft_wrap=True)
    if output and draw:
        with writing("--output", output):
            draw(output)
    if page:
        from fastmmoe_cli.page import as_png, write_page

        pictures = list(map(as_png, images))
        if draw:
            file = BytesIO()
            draw(file)
            pictures = [file.getvalue()]
        with writing("--report", page):
            write_page(page, model, question, result, time, pictures, drawn=draw is not None)
        if not json:
            console.print(f"report: {escape(str(page))}", soft_wrap=True)
    if output and not json:
        line = f"picture: {escape(str(output))}" if draw else "no picture: no layer pruned vision tokens"
        console.print(line, soft_wrap=True)
