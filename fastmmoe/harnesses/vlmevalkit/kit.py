"""VLMEvalKit in this process: where it would go on behind a failure and score it, it stops."""

from __future__ import annotations

import csv
import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from vlmeval import inference, run
from vlmeval.api.base import BaseAPI
from vlmeval.dataset import DATASET_CLASSES
from vlmeval.dataset.video_dataset_config import supported_video_datasets
from vlmeval.smp import LMUDataRoot


def data_files(names: Sequence[str]) -> list[Path]:
    """Files of those data sets that VLMEvalKit does not have itself.

    Raises:
        ValueError: a name that is none, or a file that holds no questions.
    """
    known = {name for kind in DATASET_CLASSES for name in kind.supported_datasets()}
    found = []
    for name in names:
        if name in supported_video_datasets:
            raise ValueError(f"--data {name}: holds videos, expected pictures")
        if name in known:
            continue
        path = Path(LMUDataRoot(), f"{name}.tsv")
        if not path.is_file():
            raise ValueError(
                f"--data {name}: VLMEvalKit has no such data set, and {path} is not there; `vlmutil dlist all` lists "
                "its own"
            )
        with path.open(encoding="utf-8", newline="") as file:
            head = next(csv.reader(file, delimiter="\t"), [])
        if "question" not in [column.lower() for column in head]:
            raise ValueError(f"--data {name}: {path} has no column `question`")
        found.append(path)
    return found


@functools.cache  # once
def stop_at_failures() -> None:
    """Make VLMEvalKit's functions raise, or end the process, where they would go on."""
    inference.dump = _whole(inference.dump)
    for name in ("infer_data_job", "infer_data_job_mt", "infer_data_job_video"):
        setattr(run, name, _told(getattr(run, name)))
    BaseAPI.generate = _answered(BaseAPI.generate)
    if not torch.cuda.is_available():  # it asks for NCCL
        start = torch.distributed.init_process_group
        torch.distributed.init_process_group = lambda backend, **options: start("gloo", **options)


def _whole(dump: Callable) -> Callable:
    """Answers so far, which are pickled, are written so that a kill at any moment leaves the old or the new file."""

    def dump_whole(data: Any, path: str, **options: Any) -> None:
        is_pickle = Path(path).suffix == ".pkl"
        target = f"{path}.partial.pkl" if is_pickle else path
        dump(data, target, **options)
        if is_pickle:
            os.replace(target, path)

    return dump_whole


def _told(job: Callable) -> Callable:
    """What stops the asking is told with its type, and by one of several processes before the others wait for it."""

    @functools.wraps(job)
    def told(*arguments: Any, **options: Any) -> Any:
        try:
            return job(*arguments, **options)
        except Exception as error:
            if run.WORLD_SIZE == 1:
                raise RuntimeError(f"{type(error).__name__}: {error}") from error
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    return told


def _answered(generate: Callable) -> Callable:
    """A judge that does not answer is no judgement."""

    @functools.wraps(generate)
    def answered(self: BaseAPI, *arguments: Any, **options: Any) -> Any:
        answer = generate(self, *arguments, **options)
        if isinstance(answer, str) and self.fail_msg in answer:
            raise RuntimeError(
                f"the judge {getattr(self, 'model', type(self).__name__)} does not answer, expected its key, such as "
                "OPENAI_API_KEY, or --judge exact_matching"
            )
        return answer

    return answered
