"""Tasks of lmms-eval on one loaded model, under one method after the other."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from fastmmoe.config import ReductionConfig
from fastmmoe.harnesses.lmms_eval import NAME
from fastmmoe.harnesses.lmms_eval.model import FastMMoE
from fastmmoe.harnesses.runs import Runs

OWN = ("total_gen_tokens", "total_elapsed_time", "avg_speed", "avg_latency")


def runs_of(
    names: Sequence[str], include_path: Path | None, limit: int | None, checkpoint: str, batch: int, device: str,
    dtype: str, cache: Path,
) -> Runs:  # fmt: skip
    """Tasks on a checkpoint; see `Tasks`, `Tasks.run` and `FastMMoE`.

    Raises:
        ValueError: several processes; and what they raise.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(
            f"WORLD_SIZE: fastmmoe eval runs lmms-eval in one process, got {processes}; lmms-eval's own command line "
            f"takes several: accelerate launch -m lmms_eval eval --model {NAME} --model_args pretrained=..."
        )
    tasks, model = Tasks(names, include_path, limit), FastMMoE(checkpoint, None, batch, device, dtype)
    about = {
        "harness_version": version("lmms_eval"), "gates_sha256": model.gates, "tasks": list(names),
        "include_path": include_path and include_path.name, "batch": batch,
    }  # fmt: skip
    return Runs(about, model.use, lambda config: tasks.run(model, config, cache))


class Tasks:
    """Some of lmms-eval's tasks, or of a directory's.

    Args:
        names: of tasks or groups.
        include_path: a directory with tasks of its own; None: lmms-eval's alone.

    Raises:
        ValueError: a name that is none.
    """

    def __init__(self, names: Sequence[str], include_path: Path | None, limit: int | None):
        folder = None if include_path is None else str(include_path)
        # its own tasks' index takes seconds
        manager = TaskManager(include_path=folder, include_defaults=False, model_name=NAME) if folder else None
        if manager is None or any(name not in manager.all_tasks for name in names):
            manager = TaskManager(include_path=folder, model_name=NAME)
        if unknown := [name for name in names if name not in manager.all_tasks]:
            raise ValueError(f"tasks: lmms-eval has no {', '.join(unknown)}; `lmms-eval tasks` lists them")
        self.names, self.limit, self._manager = list(names), limit, manager

    def run(self, model: FastMMoE, config: ReductionConfig | None, cache: Path) -> dict[str, Any]:
        """Ask all questions under a config.

        Args:
            cache: a directory for the answers of all models and configs; those that are there are not asked for again.

        Returns:
            `scores`: task -> metric -> number, None where it is not finite; `n`: task -> questions; `costs`: of those
            `answered`, per prompt, {} where all answers were there.

        Raises: whatever a task or a forward raises.
        """
        model.use(config)
        # a run that is stopped leaves its answers under this name, and the next one of that name goes on with them
        os.environ["LMMS_CACHE_RUN_ID"] = NAME
        with contextlib.redirect_stdout(sys.stderr):  # tasks print
            found = simple_evaluate(
                model=model,
                tasks=self.names,
                task_manager=self._manager,
                batch_size=model.batch_size,
                limit=self.limit,
                use_cache=str(cache),
                log_samples=True,
            )
        throughput = found.get("throughput", {})
        return {
            "scores": {task: _numbers(metrics) for task, metrics in found["results"].items()},
            "n": {task: count["effective"] for task, count in found["n-samples"].items()},
            "costs": {name.removeprefix("avg_"): value for name, value in throughput.items() if name not in OWN},
        }


def _numbers(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Metrics that are numbers, without the filter's name where it is none."""
    return {
        name.removesuffix(",none"): float(value) if math.isfinite(value) else None
        for name, value in metrics.items()
        if isinstance(value, Real) and not isinstance(value, bool)
    }
