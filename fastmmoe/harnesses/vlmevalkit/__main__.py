"""VLMEvalKit's own command, with a supported checkpoint as its model: `python -m fastmmoe.harnesses.vlmevalkit`.

It takes what `vlmeval.run` takes, but `--model` is one checkpoint, and runs under torchrun as that does. The method is
that of `--reduction`, or what the variables of the official scripts say (`FastMMoEConfig.from_env`); without either the
model is dense. Answers are kept apart by all that they depend on, and a run that was stopped goes on with those it has
(VLMEvalKit writes every tenth). It ends with 1 if any data set has no score, and with 2 where arguments are none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from fastmmoe.config import ReductionConfig
from fastmmoe.families import architecture_of
from fastmmoe.families.checkpoint import read_config
from fastmmoe.families.fingerprint import checkpoint_sha256, file_sha256
from fastmmoe.methods import FastMMoEConfig
from fastmmoe.methods.files import content_of, read_config_file
from fastmmoe.study.results import write_whole

# of an answer, as many as VLMEvalKit's own models take
MAX_NEW_TOKENS = 4096


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it.

    Raises:
        SystemExit: with lines that say why a data set has no score, or with 2 behind one for arguments that are none.
    """
    given, rest = _parser().parse_known_args(arguments)
    try:
        config, gates = _read_config(given.model, given.reduction)
        weights = checkpoint_sha256(given.model)
    except (OSError, ValueError, TypeError) as error:
        _refuse(f"{error}")
    words = ["vlmeval", "--data", *given.data, "--work-dir", str(given.work_dir), *rest, "--model"]
    sys.argv = [*words, "unnamed"]  # for its parser; the name depends on what that finds
    from vlmeval import run

    from fastmmoe.harnesses.vlmevalkit.kit import data_files, stop_at_failures
    from fastmmoe.harnesses.vlmevalkit.model import FastMMoE
    from fastmmoe.harnesses.vlmevalkit.outcome import STATUS, outcome

    asked = run.parse_args()
    try:
        _check(asked)
        files = {path.name: file_sha256(path) for path in data_files(given.data)}
    except ValueError as error:
        _refuse(f"{error}")
    os.environ.pop("MMEVAL_ROOT", None)  # it would stand in place of --work-dir
    about = {
        "checkpoint": weights, "method": config and content_of(config), "data": files, "limit": asked.limit,
        "judge": asked.judge, "max_new_tokens": given.max_new_tokens, "dtype": given.dtype,
    }  # fmt: skip
    name = run_name(given.model, about)
    sys.argv = [*words, name]
    folder, rank = given.work_dir / name, int(os.environ.get("RANK", 0))
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        (folder / STATUS).unlink(missing_ok=True)  # an earlier run's says nothing of this one
    run.supported_VLM[name] = partial(
        FastMMoE,
        checkpoint=given.model,
        config=config,
        gates=gates,
        max_new_tokens=given.max_new_tokens,
        costs=folder / f"costs{rank}.jsonl",
        device=given.device,
        dtype=given.dtype,
    )
    stop_at_failures()
    run.main()
    if rank:
        return
    found = outcome(folder, given.data)
    if given.outcome is not None:
        write_whole(given.outcome, found)
    if found["failures"]:
        sys.exit("\n".join(f"{dataset}: {reason}" for dataset, reason in found["failures"].items()))


def run_name(checkpoint: str, about: dict[str, Any]) -> str:
    """What VLMEvalKit calls a run, and its folder: the checkpoint's name, and a digest of what answers depend on."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return f"{Path(checkpoint).resolve().name}-{digest[:12]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastmmoe.harnesses.vlmevalkit", description="All other arguments are vlmeval.run's.", allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="checkpoint directory or hub id")
    parser.add_argument("--data", required=True, nargs="+", help="names of data sets")
    parser.add_argument("--work-dir", type=Path, default=Path("outputs"))
    parser.add_argument("--reduction", type=Path, help="JSON file of a method's settings")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--outcome", type=Path, help="JSON file for scores, failures and costs")
    return parser


def _read_config(checkpoint: str, reduction: Path | None) -> tuple[ReductionConfig | None, str | None]:
    """A config (None: dense), and the gates of the model that it was calibrated for."""
    if reduction is not None:
        return read_config_file(reduction)
    top_k = architecture_of(read_config(checkpoint)).num_experts_per_tok
    config = FastMMoEConfig.from_env(num_experts_per_tok=top_k)
    return (config if config.reduces_experts or config.prune_layers else None), None


def _check(asked: argparse.Namespace) -> None:
    """Refuse what would ask another model, or score what failed.

    Raises:
        ValueError: it is asked for.
    """
    if os.environ.get("SKIP_ERR") == "1":  # in VLMEvalKit's .env, maybe
        raise ValueError("SKIP_ERR=1: would score questions that failed as wrong answers, expected it to be unset")
    engines = [option for option in vars(asked) if option.startswith("use_") and option != "use_verifier"]
    for option in ("config", "base_url", "api_mode", *engines):
        if getattr(asked, option):
            raise ValueError(f"--{option.replace('_', '-')}: would ask another model, expected --model alone")


def _refuse(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
