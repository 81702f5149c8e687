"""What every training here has in common: its processes, its file to go on from, its log."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from provenance import provenance
from torch import nn

from quality.scoring import Packed, right_answers


def average_gradients(parameters: list[torch.Tensor], processes: int) -> None:
    """Average over the processes and clip to norm 1; parameters without a gradient get zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(flat)
    flat /= processes
    flat *= (1 / (flat.norm() + 1e-6)).clamp(max=1)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """1 where every layer uses its experts alike, more where it does not; logits [T, E] per layer."""
    losses = []
    for logits in router_logits:
        probabilities = logits.softmax(-1)
        chosen = probabilities.topk(top_k, -1).indices.flatten()
        share = chosen.bincount(minlength=logits.shape[-1]) / len(chosen)
        losses.append(logits.shape[-1] * (share * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


class BaseTrainer:
    """One process of a training.

    Attributes:
        place: the fields of its progress that say how far it is; they head every line of the log.
        modules: what learns, by its name in the file to go on from.
        progress: a dataclass of numbers, with `right` (moving exact match per type of question), `seconds` and `log`.
    """

    place: ClassVar[tuple[str, ...]]

    def __init__(
        self, rank: int, settings: Any, work: Path, minutes: float | None, resume: bool, modules: dict[str, nn.Module],
        progress: Any,
    ):  # fmt: skip
        self.rank, self.settings, self.work, self.modules, self.progress = rank, settings, work, modules, progress
        self.stop_at = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
        saved = torch.load(work / "state.pt") if resume else None
        if saved:
            self.progress = type(progress)(**saved["progress"])
            for name, module in modules.items():
                module.load_state_dict(saved[name])
        self.renew_optimisers()
        if saved:
            for optimiser, value in zip(self.optimisers, saved["optimisers"], strict=True):
                optimiser.load_state_dict(value)
        self.started = time.monotonic() - self.progress.seconds

    def make_optimisers(self) -> list[torch.optim.Optimizer]:
        """Those of where the training stands, with their full learning rates."""
        raise NotImplementedError

    def renew_optimisers(self) -> None:
        """Start anew; the full learning rates stand in `initial_lr`."""
        self.optimisers = self.make_optimisers()
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["initial_lr"] = group["lr"]

    def update(self, parameters: list[torch.Tensor], factor: float) -> None:
        """A step of the optimisers, with the learning rates times a factor."""
        average_gradients(parameters, self.settings.processes)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimiser.step()
            optimiser.zero_grad()

    def count_right(self, logits: torch.Tensor, batch: Packed) -> float:
        """The share of right answers of all processes; the progress keeps it by type."""
        right = right_answers(logits, batch).double()
        counts = torch.zeros(2, len(self.progress.right), dtype=torch.float64)
        counts[0].index_add_(0, batch.types, right)
        counts[1].index_add_(0, batch.types, torch.ones_like(right))
        dist.all_reduce(counts)
        for number, (good, asked) in enumerate(counts.T.tolist()):
            if asked:
                self.progress.right[number] += 0.05 * (good / asked - self.progress.right[number])
        return (counts[0].sum() / counts[1].sum()).item()

    def gather(self, evaluate: Callable[[int, int], list], count: int) -> list:
        """`evaluate(first, count)` of all `count` pictures, shared among the processes."""
        share = count // self.settings.processes
        parts = [None] * self.settings.processes
        dist.all_gather_object(parts, evaluate(self.rank * share, share))
        return [one for part in parts for one in part]

    def save(self) -> None:
        """Write all that a resumed training needs; a kill at any moment leaves the old or the new file."""
        if self.rank:
            return
        self.progress.seconds = time.monotonic() - self.started
        state = {name: module.state_dict() for name, module in self.modules.items()}
        state["progress"] = asdict(self.progress)
        state["optimisers"] = [optimiser.state_dict() for optimiser in self.optimisers]
        torch.save(state, self.work / "state.tmp")
        os.replace(self.work / "state.tmp", self.work / "state.pt")

    def is_out_of_time(self) -> bool:
        """Whether the first process is past its time; all have to stop at the same step."""
        flag = torch.tensor(float(time.monotonic() > self.stop_at))
        dist.broadcast(flag, 0)
        return bool(flag)

    def note(self, entry: dict) -> None:
        """A line of the log."""
        entry = {name: getattr(self.progress, name) for name in self.place} | entry
        entry["seconds"] = round(time.monotonic() - self.started, 1)
        self.progress.log.append(entry)
        if not self.rank:
            with (self.work / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")


def run_process(
    trainer_class: type[BaseTrainer], save_processor: Callable[[Path], None], rank: int, settings: Any, work: Path,
    minutes: float | None, resume: bool, options: dict,
) -> None:  # fmt: skip
    """One process: rank 0 also writes the files, at the end the model as fp16, as `from_pretrained` reads it."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads such memory
    dist.init_process_group(
        "gloo", init_method=f"file://{work}/rendezvous", rank=rank, world_size=settings.processes,
        timeout=timedelta(minutes=10),
    )  # fmt: skip
    trainer = trainer_class(rank, settings, work, minutes, resume)
    if trainer.run(**options) and rank == 0:
        result = provenance(torch.device("cpu")) | {
            "seconds": round(trainer.progress.seconds),
            "log": trainer.progress.log,
        }
        (work / "training.json").write_text(json.dumps(result, indent=1) + "\n")
        model = trainer.modules["model"]
        model.model.language_model.set_experts_implementation("eager")
        model.half().save_pretrained(work / "checkpoint")
        save_processor(work / "checkpoint")
    dist.destroy_process_group()
