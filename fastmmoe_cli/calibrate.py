"""`fastmmoe calibrate`: find under which thresholds a model's tokens skip experts, and what matters in its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from fastmmoe_cli.console import console, fail, importing, print_json, reason, refusing
from fastmmoe_cli.extras import need
from fastmmoe_cli.options import Device, Dtype, Json, check_model, read_device
from fastmmoe_cli.outputs import ask_to_overwrite, check_writable

EXAMPLE = "Example: fastmmoe calibrate --target 0.6 --out modes.json"


def calibrate(
    out: Annotated[Path, typer.Option(help="JSON file for the result, and for its steps up to then.")],
    target: Annotated[float, typer.Option(help="Share of the experts to skip, of those that all tokens choose.")],
    model: Annotated[
        str | None, typer.Option(help="Checkpoint directory or hub id.", show_default="the package's own")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Your questions: JSONL with image, question, answer; default: generated scenes."),
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="Questions to calibrate on.")] = 64,
    split: Annotated[Literal["train", "dev"], typer.Option(help="Which scenes, without --data.")] = "dev",
    resume: Annotated[bool, typer.Option(help="Go on with the steps that are in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where --out holds a calibration.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Calibrate the skipping of experts by need (MoDES): importances of layers, thresholds of text and vision."""
    need("study", "PIL", "tqdm", *(() if data else ("sklearn", "skimage")))
    if model is not None:
        check_model(model, "--model ")
    if not 0.0 < target < 1.0:
        fail(f"--target {target}: expected a share of the experts between 0 and 1")
    place = read_device(device)
    _check_out(out, resume, overwrite)
    with importing():
        from fastmmoe.calibration.calibrate import calibrate as run
        from fastmmoe.families.chat import check_question, placeholders_of
        from fastmmoe.families.checkpoint import load_model, read_config
        from fastmmoe.families.processors import load_processor
        from fastmmoe.scenes import CHECKPOINT
        from fastmmoe.study.questions import read_questions, scene_questions

    checkpoint = model or str(CHECKPOINT)
    with refusing(OSError, ValueError, TypeError, ImportError):
        examples = scene_questions(split, n) if data is None else read_questions(data, n)
        processor = load_processor(checkpoint)
        if data is not None:
            placeholders = placeholders_of(read_config(checkpoint), processor)
            for example in examples:
                check_question(example.where, example.question, placeholders)
                if not example.answer.strip():
                    raise ValueError(f"{example.where}: expected an answer, got {example.answer!r}")
                check_question(f"{example.where}: answer", example.answer, placeholders)
                example.open_image()
        kind = "float32" if dtype == "auto" and place.type == "cpu" else dtype
        loaded = load_model(checkpoint, kind, place)
        try:
            work = run(loaded, processor, examples, target, out, resume)
        except OSError as error:
            fail(f"--out {out}: could not be written: {error.strerror or reason(error)}", code=1)
    config, chosen = work.config, work.chosen
    if json:
        print_json({"out": str(out), "config": config.to_dict(), "chosen": chosen})
        return
    console.print(
        f"skips {chosen['skipped']:.1%} of the experts: text below {config.text_threshold:.3g}, vision below "
        f"{config.vision_threshold:.3g}; KL per token of the answers {chosen['divergence']:.3g}"
    )
    console.print(escape(str(out)), soft_wrap=True)


def _check_out(out: Path, resume: bool, overwrite: bool) -> None:
    """Check that the result can be written there, and that an earlier one stays or goes as the user says.

    Raises:
        typer.Abort: the user says no.
        typer.Exit: it cannot be written, or nobody can be asked.
    """
    if resume and overwrite:
        fail("--overwrite: expected it or --resume, got both")
    if out.is_dir() or not out.absolute().parent.is_dir():
        fail(f"--out {out}: expected a file in a directory that exists")
    check_writable("--out", out)
    if out.exists() and not (resume or overwrite):
        ask_to_overwrite(f"--out {out}: exists", "file")
