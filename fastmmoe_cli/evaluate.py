"""`fastmmoe eval`: a harness's tasks, dense and reduced side by side."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from fastmmoe_cli.console import console, fail, importing, print_json, refusing
from fastmmoe_cli.extras import need
from fastmmoe_cli.options import (
    Device,
    Dtype,
    Json,
    check_config,
    check_model,
    check_retention,
    read_config_option,
    read_device,
    read_layers,
)
from fastmmoe_cli.outputs import ask_to_overwrite
from fastmmoe_cli.presets import fitted

EXAMPLE = "Example: fastmmoe eval --harness lmms-eval --tasks mmmu_val --model DIR --retention 0.75 0.5 --out results"
MANY = ("--tasks", "--data", "--retention", "--config")
PART = "eval"
NOTES = (
    "costs: per prompt, of those answered for this table; latencies are a batch's, shared among its prompts.",
    "scores of groups that have no questions are null.",
)
ENVIRONMENT_RUN = "environment"
ANSWERS = "eval_answers"  # folder


class ManyValues(TyperCommand):
    """Takes `--retention 0.75 0.5` for `--retention 0.75 --retention 0.5`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        spread, option, has_value = [], None, False
        for word in args:
            if word.startswith("--"):
                option, has_value = (word if word in MANY else None), False
            elif option is not None and has_value:
                spread.append(option)
            else:
                has_value = True
            spread.append(word)
        return super().parse_args(ctx, spread)


def evaluate(
    out: Annotated[Path, typer.Option(help="Directory for the table, its figures and the answers so far.")],
    harness: Annotated[
        Literal["lmms-eval", "vlmevalkit"] | None,
        typer.Option(help="Whose tasks.", show_default="the table's, else lmms-eval"),
    ] = None,
    table: Annotated[
        Literal["retention", "experts", "latency"] | None,
        typer.Option(help="One of the paper's tables: its runs, and its tasks unless others are named."),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Of lmms-eval: names of tasks, several behind one another.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Of VLMEvalKit: names of datasets, several behind one another.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint directory or hub id.", show_default="the package's own")
    ] = None,
    retention: Annotated[
        list[float] | None, typer.Option(help="Shares of the vision tokens left, a run each; beside the dense run.")
    ] = None,
    vision_top_k: Annotated[
        int | None, typer.Option(help="Experts per vision token.", show_default="the preset's")
    ] = None,
    reduction_layer: Annotated[int | None, typer.Option(help="First layer that uses --vision-top-k.")] = None,
    prune_layers: Annotated[
        str | None, typer.Option(help="Layers that prune, such as 5,8,12.", show_default="the preset's")
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option("--config", help="JSON files of settings, as config.to_dict() gives them: a run each."),
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Of lmms-eval: directory with tasks of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task.", show_default="all")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Of lmms-eval: prompts per batch.", show_default="1")] = None,
    python: Annotated[
        str | None,
        typer.Option(help="Of VLMEvalKit: the Python of its environment.", show_default="this one"),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="Of VLMEvalKit: what compares answers, exact_matching or a model.", show_default="its own"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the runs and answers in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where --out holds runs.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Run a harness's tasks on a checkpoint, dense and reduced, into one table of scores, FLOPs and latencies.

    Where the official scripts' variables are set (MERGE_LAYER_LOCS, KEEP_TOKEN_RATIO, ...), what they say is a run too.
    --table runs what one of the paper's tables shows: every method at every retention, every number of experts from
    every layer on, or latencies.
    """
    named = {"--retention": retention, "--vision-top-k": vision_top_k, "--reduction-layer": reduction_layer}
    if table is not None and any(value for value in (*named.values(), prune_layers)):
        fail(f"--table: says what is run, expected no {', '.join(named)} or --prune-layers")
    shown = None
    if table is not None:
        with importing():
            from fastmmoe.harnesses.paper import TABLES

        shown = TABLES[table]
    harness = harness or ("lmms-eval" if shown is None else shown.harness)
    is_lmms_eval = harness == "lmms-eval"
    of_other = (
        {"--data": data, "--python": python, "--judge": judge}
        if is_lmms_eval
        else {"--tasks": tasks, "--batch": batch, "--include-path": include_path}
    )
    for name, value in of_other.items():
        if value is not None:
            fail(f"{name}: {harness} has no such option")
    names = tasks if is_lmms_eval else data
    if shown is not None and shown.harness == harness:
        names, batch = names or list(shown.tasks), batch or shown.batch
    if not names:
        fail(f"{'--tasks' if is_lmms_eval else '--data'}: expected the names of some of {harness}'s")
    if model is not None:
        check_model(model, "--model ")
    for share in retention or []:
        check_retention(share)
    if resume and overwrite:
        fail("--overwrite: expected it or --resume, got both")
    if include_path is not None and not include_path.is_dir():
        fail(f"--include-path {include_path}: no such directory")
    for path in config or []:
        check_config(path, {})
    if python is not None and os.sep in python and not Path(python).is_file():
        fail(f"--python {python}: No such file or directory")
    given = {
        "vision_top_k": vision_top_k, "reduction_layer": reduction_layer, "prune_layers": read_layers(prune_layers),
    }  # fmt: skip
    settings = {name: value for name, value in given.items() if value is not None}
    if settings and not retention:
        option = f"--{next(iter(settings)).replace('_', '-')}"
        fail(f"{option}: without effect on the dense model, expected a --retention with it, such as 1.0")
    if is_lmms_eval:
        need(harness, "lmms_eval")
    place = read_device(device)
    with importing():
        from fastmmoe.families import architecture_of
        from fastmmoe.families.checkpoint import read_config
        from fastmmoe.harnesses.comparison import as_markdown, columns
        from fastmmoe.methods import FastMMoEConfig
        from fastmmoe.methods.fastmmoe import ENVIRONMENT
        from fastmmoe.scenes import CHECKPOINT
        from fastmmoe.study.results import PartFile, header

    if any((out / name).exists() for name in (f"{PART}.json", ANSWERS)) and not (resume or overwrite):
        ask_to_overwrite(f"--out {out}: holds runs", "directory")
    checkpoint = model or str(CHECKPOINT)
    kind = "float32" if dtype == "auto" and place.type == "cpu" else dtype
    with refusing(OSError, ValueError, TypeError, ImportError, RuntimeError):
        shape = read_config(checkpoint)
        if shown is not None:
            configs = shown.configs(shape, architecture_of(shape))
        else:
            # layers that fit, if any prunes: said once
            pruning = fitted(shape, settings | {"retention": min(retention)}) if retention else {}
            configs = {"dense": None} | {
                f"retention {share:g}": FastMMoEConfig.preset(
                    shape, **(settings if share == 1.0 else pruning) | {"retention": share}
                )
                for share in retention or []
            }
        for path in config or []:
            if path.stem in configs:
                raise ValueError(f"--config {path}: a run is called {path.stem!r} already, expected another name")
            configs[path.stem] = read_config_option(path)
        if any(os.environ.get(name, "").strip() for name in ENVIRONMENT):
            top_k = architecture_of(shape).num_experts_per_tok
            configs[ENVIRONMENT_RUN] = FastMMoEConfig.from_env(num_experts_per_tok=top_k)
        if is_lmms_eval:
            from fastmmoe.harnesses.lmms_eval.evaluate import runs_of

            runs = runs_of(names, include_path, limit, checkpoint, batch or 1, str(place), kind, out / ANSWERS)
        else:
            from fastmmoe.harnesses.vlmevalkit.evaluate import runs_of

            runs = runs_of(names, python, judge, limit, checkpoint, str(place), kind, out / ANSWERS)
        for one in configs.values():  # what does not fit is refused in front of the first question
            runs.check(one)
        asked = {"harness": harness, "model": Path(checkpoint).name, "limit": limit, "dtype": kind} | runs.about
        asked |= {} if table is None else {"table": table}
        out.mkdir(parents=True, exist_ok=True)
        if not resume:  # anew is without what was answered then
            shutil.rmtree(out / ANSWERS, ignore_errors=True)
            for ending in ("json", "md"):
                (out / f"{PART}.{ending}").unlink(missing_ok=True)
        file = PartFile(out, PART, header(asked | {"settings": settings}, NOTES), resume)
        there = {run["name"]: run["config"] for run in file.rows}
        described = {
            name: one and {"type": type(one).__name__, **one.to_dict()} for name, one in configs.items()
        }
        for name, settings_there in there.items():
            if name in described and described[name] != settings_there:
                raise ValueError(f"--out {out}: its run {name!r} has other settings, expected the same or --overwrite")
        for name, one in configs.items():
            if name not in there:
                file.add({"name": name, "config": described[name], **runs.run(one)})
                (out / f"{PART}.md").write_text(as_markdown(file.rows) + "\n", encoding="utf-8")
    if json:
        print_json({"out": str(out), "runs": file.rows})
        return
    head, *rows = columns(file.rows)
    table = Table()
    for name in head:
        table.add_column(escape(name), justify="left" if name == head[0] else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    console.print(escape(str(out)), soft_wrap=True)
