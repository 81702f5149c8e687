"""Datasets of VLMEvalKit on one checkpoint, under one method after the other, a process each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastmmoe
from fastmmoe.config import ReductionConfig
from fastmmoe.families.checkpoint import read_config
from fastmmoe.families.fingerprint import checkpoint_sha256
from fastmmoe.harnesses.runs import Runs
from fastmmoe.harnesses.vlmevalkit import DISTRIBUTION, MODULE
from fastmmoe.methods.fastmmoe import ENVIRONMENT
from fastmmoe.methods.files import content_of

# of torchrun: what it starts is one process of its own
PROCESSES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")

_PROBE = (
    f"import fastmmoe.harnesses.{__package__.rpartition('.')[2]}, importlib.util as u, sys; "
    f"u.find_spec({MODULE!r}) or sys.exit('no {MODULE}'); "
    f"from importlib.metadata import version; print(version({DISTRIBUTION!r}))"
)


def runs_of(
    names: Sequence[str], python: str | None, judge: str | None, limit: int | None, checkpoint: str, device: str,
    dtype: str, out: Path,
) -> Runs:  # fmt: skip
    """Datasets on a checkpoint.

    Args:
        names: of datasets that VLMEvalKit knows, or of files `$LMUData/NAME.tsv`.
        python: the interpreter of an environment with this package and VLMEvalKit; None: this one.
        judge: what compares answers, "exact_matching" or a model's name; None: each dataset's own.
        limit: questions of each dataset; None: all.
        out: a directory for VLMEvalKit's files: a run that was stopped goes on with those it has.

    Raises:
        OSError, ValueError: no checkpoint, or an environment that lacks one of the two.
    """
    python = python or sys.executable
    shape, version = read_config(checkpoint), _version(python)
    options = ["--device", device, "--dtype", dtype]
    if judge is not None:
        options += ["--judge", judge]
    if limit is not None:
        options += ["--limit", str(limit)]

    def check(config: ReductionConfig | None) -> None:
        if config is not None:
            fastmmoe.flops(shape, 1, 1, config)

    def run(config: ReductionConfig | None) -> dict[str, Any]:
        return _run([python, "-m", __package__, "--model", checkpoint, "--data", *names, *options], config, out)

    about = {
        "harness_version": version, "checkpoint_sha256": checkpoint_sha256(checkpoint), "data": list(names),
        "judge": judge,
    }  # fmt: skip
    return Runs(about, check, run)


def _version(python: str) -> str:
    try:
        found = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"--python {python}: {error.strerror or error}") from error
    if found.returncode:
        why = (found.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(
            f"--python {python}: has no fastmmoe with VLMEvalKit ({why}); `make vlmevalkit` builds an environment, or: "
            f"python -m venv DIR; DIR/bin/pip install . {DISTRIBUTION} (in a checkout)"
        )
    return found.stdout.split()[-1]


def _run(command: Sequence[str], config: ReductionConfig | None, out: Path) -> dict[str, Any]:
    # what the official scripts' variables say is one run's, and comes as its config
    environment = {name: value for name, value in os.environ.items() if name not in (*ENVIRONMENT, *PROCESSES)}
    with tempfile.TemporaryDirectory() as folder:
        outcome, settings = Path(folder, "outcome.json"), Path(folder, "settings.json")
        command = [*command, "--work-dir", str(out), "--outcome", str(outcome)]
        if config is not None:
            settings.write_text(json.dumps(content_of(config)), encoding="utf-8")
            command += ["--reduction", str(settings)]
        with subprocess.Popen(command, env=environment, stdout=sys.stderr) as process:
            try:
                code = process.wait()
            except KeyboardInterrupt:  # the terminal told the process too, which may be writing
                process.wait()
                raise
        if not outcome.exists():
            raise RuntimeError(f"{MODULE} ended with {code}; what it printed says why")
        found = json.loads(outcome.read_text(encoding="utf-8"))
    if found["failures"]:
        raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in found["failures"].items()))
    return {name: found[name] for name in ("scores", "metrics", "costs")}
