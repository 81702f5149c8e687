"""The commands behind `fastmmoe`. Figures go to stdout, progress and errors to stderr; bad input exits with code 2."""

from __future__ import annotations

import importlib.util
import json as json_
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import fastmmoe
from fastmmoe.cli import doctor as doctor_
from fastmmoe.cli.compare import Comparison, build_inputs
from fastmmoe.cli.compare import compare as compare_
from fastmmoe.families import ARCHITECTURES

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel

    from fastmmoe.report import PrefillReport


app = typer.Typer(
    help="Faster prefill of multimodal mixture-of-experts models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
stderr = Console(stderr=True)

# options that several commands share
Images = Annotated[list[Path] | None, typer.Option("--image", help="Image file; repeat for several images.")]
Retention = Annotated[float, typer.Option(help="Share of the vision tokens left after the last prune layer.")]
VisionTopK = Annotated[int | None, typer.Option(help="Experts per vision token.", show_default="half of the model's")]
Layers = Annotated[
    str | None, typer.Option("--prune-layers", help="Layers that prune, such as 5,8,12.", show_default="the preset's")
]
NewTokens = Annotated[int, typer.Option(min=1, help="Length of the answers.")]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]


@app.command(epilog="Example: fastmmoe demo --question 'how many digits ?' --retention 0.5 --output picture.png")
def demo(
    image: Annotated[Path | None, typer.Option(help="Image file.", show_default="a picture of the test split")] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option("--question", help="Repeat for several.", show_default="one of every type the model knows"),
    ] = None,
    retention: Retention = 0.5,
    output: Annotated[Path, typer.Option(help="Where to draw what became of each token.")] = Path("fastmmoe_demo.png"),
    json: Json = False,
) -> None:
    """Ask a small trained MoE-MLLM about a picture, with FastMMoE off and on: no GPU, no download."""
    _need("demo", "PIL", "matplotlib")
    from fastmmoe.cli import demo as demo_
    from fastmmoe.cli.picture import draw_fate
    from fastmmoe.families.processors import tilings
    from fastmmoe.scenes import exact_match

    _check_output(output)
    picture, known = demo_.demo_example()
    if image is not None:
        (picture,), known = _open_images([image]), []
    # of a picture of the user's, the right answers are not known
    answers = {question.text: question.answer for question in known}
    asked = questions or [question.text for question in demo_.demo_example()[1]]
    with _refusing(ValueError, TypeError):
        config = demo_.demo_config(retention)
    results = []
    with _one_thread():
        model, processor = demo_.demo_model()
        with _progress("", total=2 * len(asked)) as step:
            for question in asked:
                inputs = build_inputs(model, processor, [picture], question)
                results.append(
                    compare_(
                        model,
                        processor,
                        inputs,
                        config,
                        max_new_tokens=8,
                        runs=0,
                        progress=lambda _, q=question: step(q),
                    )
                )
    drawn = None
    if results[-1].report.stages:
        drawn = str(output)
        draw_fate(output, [picture], tilings(model.config, processor, [picture]), results[-1].report)
    if json:
        rows = [
            {"question": text, "right": answers.get(text), "dense": result.dense_answer, "fastmmoe": result.fast_answer}
            for text, result in zip(asked, results, strict=True)
        ]
        report = results[-1].report.to_dict()
        _print_json({"config": config.to_dict(), "answers": rows, "report": report, "picture": drawn})
        return
    table = Table("question", title=f"{results[-1].report.n_vision[0]} vision tokens", caption="green: right")
    for name in ("right answer", "FastMMoE off", "on"):
        table.add_column(name)
    for text, result in zip(asked, results, strict=True):
        right = answers.get(text)
        shown = [
            f"[green]{escape(said)}[/]" if right is not None and exact_match(said, right) else escape(said)
            for said in (result.dense_answer, result.fast_answer)
        ]
        table.add_row(escape(text), right or "", *shown)
    console.print(table)
    console.print(_token_table(results[-1].report))
    if drawn:
        console.print(_stage_table(results[-1].report))
    console.print(f"language model FLOPs saved: {results[-1].report.flops.saved:.1%}")
    if drawn:
        console.print(f"picture, for the last question: {escape(drawn)}", soft_wrap=True)


@app.command(epilog="Example: fastmmoe bench --retention 0.5 --output picture.png")
def bench(
    images: Images = None,
    prompt: Annotated[str | None, typer.Option(help="The question.", show_default="a fixed one")] = None,
    retention: Retention = 0.5,
    output: Annotated[Path | None, typer.Option(help="PNG to draw what became of each token.")] = None,
    max_new_tokens: NewTokens = 8,
    seed: Annotated[int, typer.Option(help="Seed of the model's random weights.")] = 0,
    json: Json = False,
) -> None:
    """Time a prefill of 1,792 vision tokens on this CPU, with FastMMoE off and on: a random model, no download."""
    _need("demo", "PIL", *(("matplotlib",) if output else ()), *(() if images else ("skimage",)))
    from fastmmoe.cli import random_model

    if output:
        _check_output(output)
    pictures = _open_images(images) if images else [random_model.cat_photograph()]
    with _refusing(ValueError, TypeError):
        config = fastmmoe.FastMMoEConfig.preset(random_model.random_config(), retention=retention)
    with _one_thread():
        with _progress("building the model"):
            model, processor = random_model.random_model(seed), random_model.random_processor()
        result = _compare(model, processor, pictures, prompt or random_model.PROMPT, config, max_new_tokens, output)
    _show("random model", result, output, json)
    if not json:
        note = "The weights are random: the answers are babble, only their cost means something. One CPU thread."
        console.print(note, soft_wrap=True)


@app.command(
    epilog="Example: fastmmoe run --model OpenGVLab/InternVL3_5-30B-A3B-HF --image a.jpg --prompt 'What is it?'"
)
def run(
    model: Annotated[str, typer.Option(help="Checkpoint directory or hub id.")],
    images: Annotated[list[Path], typer.Option("--image", help="Image file; repeat for several images.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    retention: Retention = 0.5,
    vision_top_k: VisionTopK = None,
    prune_layers: Layers = None,
    alpha: Annotated[
        float | None, typer.Option(help="Weight of routing similarity in [0, 1].", show_default="the preset's")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="hybrid, routing_similarity or dynamic_attention.", show_default="the preset's"),
    ] = None,
    keep_by: Annotated[
        str | None, typer.Option(help="importance (the paper's) or redundancy (ours).", show_default="importance")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")] = "auto",
    max_new_tokens: NewTokens = 128,
    output: Annotated[Path | None, typer.Option(help="PNG to draw what became of each token (InternVL).")] = None,
    json: Json = False,
) -> None:
    """Ask a checkpoint about images, with FastMMoE off and on, and compare answers, FLOPs and prefill times."""
    _need("demo", "PIL", *(("matplotlib",) if output else ()))
    from transformers import AutoConfig, AutoModelForImageTextToText

    from fastmmoe.families.processors import load_processor

    if output:
        _check_output(output)
    pictures = _open_images(images)
    if not Path(model).is_dir() and (model.count("/") > 1 or model.startswith((".", "/", "~"))):
        _fail(f"--model {model}: no such directory")
    given = {
        "vision_top_k": vision_top_k,
        "prune_layers": _layers(prune_layers),
        "alpha": alpha,
        "strategy": strategy,
        "keep_by": keep_by,
    }
    overrides = {name: value for name, value in given.items() if value is not None}
    target = _device(device)
    with _refusing(OSError, ValueError, TypeError):
        # before the weights are loaded, which may take minutes
        described = AutoConfig.from_pretrained(model)
        config = fastmmoe.FastMMoEConfig.preset(described, retention=retention, **overrides)
    with _refusing(OSError, ValueError, ImportError), _progress("loading the model"):
        processor = load_processor(model)
        loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).to(target).eval()
    result = _compare(loaded, processor, pictures, prompt, config, max_new_tokens, output)
    _show(model, result, output, json)


@app.command(
    epilog="Example: fastmmoe flops internvl3.5-30b-a3b --text 100 --vision 1792 --vision-top-k 4 "
    "--prune-layers 5,8,12 --retention 0.5"
)
def flops(
    model: Annotated[str, typer.Argument(help=f"A checkpoint directory, or one of {', '.join(ARCHITECTURES)}.")],
    text: Annotated[int, typer.Option(min=0, help="Text tokens of the prompt.")] = 100,
    vision: Annotated[int, typer.Option(min=0, help="Vision tokens of the prompt.")] = 1792,
    vision_top_k: Annotated[
        int | None, typer.Option(help="Experts per vision token.", show_default="the model's")
    ] = None,
    reduction_layer: Annotated[int, typer.Option(help="First layer that uses --vision-top-k.")] = 2,
    prune_layers: Annotated[
        str | None, typer.Option(help="Layers that prune, such as 5,8,12.", show_default="none")
    ] = None,
    retention: Retention = 1.0,
    json: Json = False,
) -> None:
    """Count a prefill's FLOPs, dense and with FastMMoE (the language model only), without loading any weights."""
    from transformers import AutoConfig

    from fastmmoe.families.processors import register_ports

    register_ports()

    with _refusing(OSError, ValueError, TypeError):
        config = fastmmoe.FastMMoEConfig(
            vision_top_k=vision_top_k,
            reduction_layer=reduction_layer,
            prune_layers=_layers(prune_layers) or (),
            retention=retention,
        )
        architecture = AutoConfig.from_pretrained(model) if Path(model).is_dir() else model
        report = fastmmoe.flops(architecture, text, vision, config)
    if json:
        question = {"model": model, "n_text": text, "n_vision": vision, "config": config.to_dict()}
        _print_json({**question, **asdict(report)})
        return
    unit, name = (1e12, "TFLOPs") if report.dense >= 1e12 else (1e9, "GFLOPs")
    table = Table("layers", title=f"{model}: prefill of {text:,} text and {vision:,} vision tokens, in {name}")
    for column in ("attention tokens", "MoE tokens", "dense", "FastMMoE", "saved"):
        table.add_column(column, justify="right")
    for _, group in groupby(report.per_layer, lambda row: (row.attention_tokens, row.moe_tokens, row.reduced)):
        rows = list(group)
        dense, reduced = sum(row.dense for row in rows), sum(row.reduced for row in rows)
        tokens = f"{rows[0].attention_tokens:,}", f"{rows[0].moe_tokens:,}"
        figures = f"{dense / unit:.2f}", f"{reduced / unit:.2f}", f"{1 - reduced / dense:.1%}"
        table.add_row(_span([row.layer for row in rows]), *tokens, *figures)
    table.add_section()
    figures = f"{report.dense / unit:.2f}", f"{report.reduced / unit:.2f}", f"{report.saved:.1%}"
    table.add_row("all", "", "", *figures, style="bold")
    console.print(table)


@app.command(epilog="Example: fastmmoe analyze --out results --workers 2 --resume")
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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")] = "auto",
    json: Json = False,
) -> None:
    """Study what the reductions cost in right answers: methods, layers, ablations, FLOPs and times, with plots."""
    _need("study", "PIL", "matplotlib", "tqdm", *(() if data else ("sklearn", "skimage")))
    from fastmmoe.study import plots, study, tables

    settings = study.Settings(
        model=model, data=data, dev_data=dev_data, split=split, n=n, dev_n=dev_n, seed=seed, threads=threads,
        batch=batch, max_new_tokens=max_new_tokens, device=str(_device(device)), dtype=dtype,
    )  # fmt: skip
    chosen = settings.default_parts if parts is None else [part.strip() for part in parts.split(",") if part.strip()]
    with _refusing(OSError, ValueError, TypeError):
        work = study.Study(settings, out, chosen, resume=resume)
    work.run(workers)
    written = [*tables.write_tables(out), *plots.draw_plots(out)]
    if json:
        hidden = ("right",)  # one digit per question
        figures = {
            part: [{name: value for name, value in row.items() if name not in hidden} for row in file.rows]
            for part, file in work.files.items()
        }
        _print_json({"out": str(out), "parts": figures})
        return
    for path in [*(file.path for file in work.files.values()), *written]:
        console.print(escape(str(path)), soft_wrap=True)


@app.command(epilog="Example: fastmmoe doctor --json")
def doctor(json: Json = False) -> None:
    """Tell what this machine offers to FastMMoE, what is missing, and how to get it."""
    findings = doctor_.examine()
    if json:
        _print_json({"findings": [asdict(finding) for finding in findings]})
        return
    table = Table("", "", "found")
    table.add_column("to do", overflow="fold")
    for group, members in groupby(findings, lambda finding: finding.group):
        for finding in members:
            style = "" if finding.ok else "yellow"
            table.add_row(group, finding.name, escape(finding.found), escape(finding.advice), style=style)
            group = ""
        table.add_section()
    console.print(table)


def _compare(
    model: PreTrainedModel,
    processor: Any,
    images: Sequence[Image],
    prompt: str,
    config: fastmmoe.FastMMoEConfig,
    max_new_tokens: int,
    output: Path | None,
) -> Comparison:
    """Check everything that can be refused, run both ways, and draw the picture if one is wanted."""
    with _refusing(ValueError, TypeError):
        # an unsupported model or a layer it does not have, before any work is done
        with fastmmoe.enabled(model, config):
            pass
        if output:
            from fastmmoe.cli.picture import draw_fate
            from fastmmoe.families import processors

            tilings = processors.tilings(model.config, processor, images)
    inputs = build_inputs(model, processor, images, prompt)
    runs = 5 if model.device.type == "cuda" else 3
    with _progress("", total=2 + runs) as step:
        result = compare_(model, processor, inputs, config, max_new_tokens=max_new_tokens, runs=runs, progress=step)
    if output and result.report.stages:
        draw_fate(output, images, tilings, result.report)
    return result


def _show(model: str, result: Comparison, output: Path | None, json: bool) -> None:
    report = result.report
    drawn = str(output) if output and report.stages else None
    if json:
        _print_json({"model": model, **result.to_dict(), "picture": drawn})
        return
    console.print(_cost_table(result))
    console.print(_token_table(report))
    if report.stages:
        console.print(_stage_table(report))
    console.print("[bold]off:[/]", escape(result.dense_answer), soft_wrap=True)
    console.print("[bold]on: [/]", escape(result.fast_answer), soft_wrap=True)
    if drawn:
        console.print(f"picture: {escape(drawn)}", soft_wrap=True)
    elif output:
        console.print("no picture: no layer pruned vision tokens")


def _cost_table(result: Comparison) -> Table:
    counted = result.report.flops
    table = Table("prefill", title=f"{result.report.n_text[0]:,} text and {result.report.n_vision[0]:,} vision tokens")
    for name in ("FastMMoE off", "on", "saved"):
        table.add_column(name, justify="right")
    table.add_row("language model", _flops(counted.dense), _flops(counted.reduced), f"{counted.saved:.1%}")
    table.add_row(
        "time, vision tower included",
        f"{result.dense_prefill * 1e3:,.0f} ms",
        f"{result.fast_prefill * 1e3:,.0f} ms",
        f"{1 - result.fast_prefill / result.dense_prefill:.1%}",
    )
    table.caption = f"times: medians of {result.runs} alternating runs"
    return table


def _token_table(report: PrefillReport) -> Table:
    table = Table("layers", title="tokens in the MoE")
    table.add_column("tokens", justify="right")
    tokens = [per_sample[0] for per_sample in report.tokens_per_layer]
    for count, group in groupby(range(len(tokens)), tokens.__getitem__):
        table.add_row(_span(list(group)), f"{count:,}")
    return table


def _stage_table(report: PrefillReport) -> Table:
    table = Table("layer", title="vision tokens")
    for name in ("entering", "kept", "merged", "dropped"):
        table.add_column(name, justify="right")
    for stage in report.stages:
        counts = (stage.entering[0], stage.kept[0], stage.merged[0], stage.dropped[0])
        table.add_row(str(stage.layer), *(f"{count:,}" for count in counts))
    table.caption = "merged: one for each window"
    return table


def _flops(value: float) -> str:
    return f"{value / 1e12:.2f} TFLOPs" if value >= 1e12 else f"{value / 1e9:.2f} GFLOPs"


def _span(layers: Sequence[int]) -> str:
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"


def _print_json(value: dict) -> None:
    typer.echo(json_.dumps(value, indent=2))


def _fail(message: str) -> NoReturn:
    stderr.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(2)


@contextmanager
def _refusing(*kinds: type[Exception]) -> Iterator[None]:
    """Turn what bad input raises into one line and exit code 2."""
    try:
        yield
    except kinds as error:
        _fail((str(error).strip() or type(error).__name__).splitlines()[0])


@contextmanager
def _progress(description: str, total: int | None = None):
    """A progress bar on stderr, if that is a terminal; yields a function that names the step about to begin."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        # from -1: naming the first step has completed none
        task = bar.add_task(description, total=total, completed=-1 if total else 0)
        yield lambda step: bar.update(task, description=step, advance=1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """A small model leaves too little to share: threads that wait for each other can take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _need(extra: str, *modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        _fail(f"this needs {', '.join(missing)}: pip install 'fastmmoe[{extra}]'")


def _check_output(output: Path) -> None:
    if output.suffix.lower() != ".png" or not output.parent.is_dir():
        _fail(f"--output {output}: expected a .png file in a directory that exists")


def _open_images(paths: Sequence[Path]) -> list[Image]:
    from PIL import Image, ImageOps

    images = []
    for path in paths:
        try:
            images.append(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        except OSError as error:  # also Pillow's own for what is no image
            reason = error.strerror or "not an image that Pillow can read"
            _fail(f"--image {path}: {reason}")
    return images


def _layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(layer) for layer in text.split(",") if layer.strip())
    except ValueError:
        _fail(f"--prune-layers {text}: expected layer numbers such as 5,8,12")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _refusing(RuntimeError):
        device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        _fail(f"--device {name}: this machine has {torch.cuda.device_count()} such GPUs")
    return device
