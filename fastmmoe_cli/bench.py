"""`fastmmoe bench`: prefill times of a random model on this CPU."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastmmoe_cli.console import console, importing, progress, refusing
from fastmmoe_cli.extras import need
from fastmmoe_cli.options import (
    IMAGES,
    Config,
    HalfRetention,
    Json,
    NewTokens,
    Report,
    check_config,
    check_images,
    check_prompt,
    check_retention,
    open_images,
    read_config_option,
)
from fastmmoe_cli.outputs import check_output, check_page

if TYPE_CHECKING:
    from PIL.Image import Image

EXAMPLE = "Example: fastmmoe bench --retention 0.5 --output picture.png"
PROMPT = "Describe this photograph in one sentence."


def bench(
    images: Annotated[list[Path] | None, IMAGES] = None,
    prompt: Annotated[str | None, typer.Option(help="The question.", show_default="a fixed one")] = None,
    retention: HalfRetention = None,
    config: Config = None,
    output: Annotated[Path | None, typer.Option(help="PNG to draw what became of each token.")] = None,
    max_new_tokens: NewTokens = 8,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the model's random weights.")] = 0,
    report: Report = None,
    json: Json = False,
) -> None:
    """Time a prefill of 1,792 vision tokens on this CPU, with FastMMoE off and on: a random model, no download."""
    drawing, page = ("matplotlib",) if output or report else (), ("jinja2",) if report else ()
    need("demo", "PIL", *drawing, *page, *(() if images else ("skimage",)))
    if output:
        check_output(output)
    if report:
        check_page(report)
    check_images(images or [])
    check_prompt("--prompt", prompt)
    check_retention(retention)
    check_config(config, {"retention": retention})
    with importing():
        from fastmmoe import FastMMoEConfig
        from fastmmoe.families import FAMILIES
        from fastmmoe.families.chat import check_question, placeholders_of
        from fastmmoe_cli.ask import ask, show
        from fastmmoe_cli.threads import one_thread

    # of the first family that has a small one
    small = importlib.import_module(next(family.random_model for family in FAMILIES if family.random_model))
    pictures = open_images(images) if images else [cat_photograph()]
    if config is not None:
        settings = read_config_option(config)
    else:
        with refusing(ValueError, TypeError):
            settings = FastMMoEConfig.preset(small.random_config(), retention=0.5 if retention is None else retention)
    processor, question = small.random_processor(), PROMPT if prompt is None else prompt
    with refusing(ValueError):
        check_question("--prompt", question, placeholders_of(small.random_config(), processor))
    with one_thread():
        with progress("building the model"):
            model = small.random_model(seed)
        result, draw = ask(model, processor, pictures, question, settings, max_new_tokens, output, page=report)
    show("random model", question, pictures, result, output, json, draw, report)
    if not json:
        note = "The weights are random: the answers are babble, only their cost means something. One CPU thread."
        console.print(note, soft_wrap=True)


def cat_photograph() -> Image:
    """A 451 x 300 photograph of a cat: 3 x 2 tiles and a thumbnail of the random model's.

    It comes inside scikit-image's wheel (`skimage.data.chelsea`, CC0, by Stefan van der Walt).
    """
    from PIL import Image
    from skimage import data

    return Image.fromarray(data.chelsea())
