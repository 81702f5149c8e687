"""`fastmmoe run`: a question to a checkpoint of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastmmoe_cli.console import fail, importing, progress, refusing
from fastmmoe_cli.extras import need
from fastmmoe_cli.options import (
    IMAGES,
    VIDEOS,
    Config,
    Device,
    Dtype,
    HalfRetention,
    Json,
    KeepBy,
    NewTokens,
    Report,
    Strategy,
    check_config,
    check_images,
    check_model,
    check_prompt,
    check_pruning,
    check_retention,
    open_images,
    prune_layers_option,
    read_config_option,
    read_device,
    read_layers,
    vision_top_k_option,
)
from fastmmoe_cli.outputs import check_output, check_page
from fastmmoe_cli.presets import preset_for
from fastmmoe_cli.videos import check_videos, open_videos

EXAMPLE = "Example: fastmmoe run --model DIR --image a.jpg --prompt 'What is it?'"


def run(
    model: Annotated[str, typer.Option(help="Checkpoint directory or hub id.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    images: Annotated[list[Path] | None, IMAGES] = None,
    videos: Annotated[list[Path] | None, VIDEOS] = None,
    retention: HalfRetention = None,
    vision_top_k: Annotated[int | None, vision_top_k_option("half of the model's")] = None,
    prune_layers: Annotated[str | None, prune_layers_option("the preset's")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Weight of routing similarity in [0, 1].", show_default="the preset's")
    ] = None,
    strategy: Strategy = None,
    keep_by: KeepBy = None,
    config: Config = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_new_tokens: NewTokens = 128,
    output: Annotated[
        Path | None, typer.Option(help="PNG to draw what became of each token, where it is known which is where.")
    ] = None,
    report: Report = None,
    json: Json = False,
) -> None:
    """Ask a checkpoint about pictures or videos, FastMMoE off and on: compare answers, FLOPs and prefill times."""
    need("demo", "PIL", *(("matplotlib",) if output or report else ()), *(("jinja2",) if report else ()))
    if output:
        check_output(output)
    if report:
        check_page(report)
    if not images and not videos:
        fail("--image: expected at least one, or a --video")
    if output and videos:
        fail(f"--output {output}: a picture shows images alone, expected none or no --video")
    check_images(images or [])
    check_videos(videos or [])
    check_model(model, option="--model ")
    check_prompt("--prompt", prompt)
    check_retention(retention)
    given = {
        "vision_top_k": vision_top_k,
        "prune_layers": read_layers(prune_layers),
        "alpha": alpha,
        "strategy": strategy,
        "keep_by": keep_by,
    }
    check_config(config, given | {"retention": retention})
    how = {"--prune-layers": prune_layers, "--alpha": alpha, "--strategy": strategy, "--keep-by": keep_by}
    check_pruning(retention, how)
    overrides = {name: value for name, value in given.items() if value is not None}
    with importing():
        from fastmmoe.families.chat import check_question, placeholders_of
        from fastmmoe.families.checkpoint import load_model, read_config
        from fastmmoe.families.processors import check_videos_of, load_processor
        from fastmmoe_cli.ask import ask, show

    pictures, target = open_images(images or []), read_device(device)
    # before the weights are loaded, which may take minutes
    with refusing(OSError, ValueError, ImportError, before="--model: "), progress("reading the config"):
        described = read_config(model)
    if config is not None:
        settings = read_config_option(config)
    else:
        with refusing(ValueError, TypeError, options=True):
            settings = preset_for(described, retention=0.5 if retention is None else retention, **overrides)
    with refusing(OSError, ValueError, ImportError, before="--model: "), progress("loading the processor"):
        processor = load_processor(model)
        if videos:
            check_videos_of(described, processor)
    with refusing(ValueError):
        check_question("--prompt", prompt, placeholders_of(described, processor))
    clips = open_videos(videos or [], processor)
    with refusing(OSError, ValueError, ImportError, before="--model: "), progress("loading the model"):
        loaded = load_model(model, dtype, target)
    result, draw = ask(loaded, processor, pictures, prompt, settings, max_new_tokens, output, clips, report)
    show(model, prompt, pictures, result, output, json, draw, report)
