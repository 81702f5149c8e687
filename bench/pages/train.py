"""Train the pages' model: about an hour on two CPU cores.

    python bench/pages/train.py --work /tmp/pages
    python bench/pages/train.py --work /tmp/pages --resume

First the language model learns to answer, on vision tokens that say in its own words what they show, pages small at
first. Then the vision tower learns to say that, from pictures: of letters in every combination but the words of dev
and test. Then both go on together. Every process computes its share of a batch on one thread and the gradients are
averaged. The data of a step depend on its number and on the answers so far, which a checkpoint holds, so a resumed
training goes on as if it had not stopped. The last step's weights are the result; dev is only watched, test is not
touched.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from math import isqrt
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from torch import nn
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from provenance import provenance
from quality import dispatch
from quality.muon import Muon
from quality.train import average_gradients, balance_loss

from pages.batches import IGNORE, NAMES, cell_labels, draw_questions, ideal_features, pack, patches
from pages.evaluate import answer_logits, evaluate_packed, right_answers, summarise
from pages.layout import generator, page, syllables
from pages.model import new_model
from pages.processor import save_processor
from pages.render import render
from pages.schedule import STAGES, Stage, rate
from pages.words import VOCABULARY

PAGES_PER_SEED = 100_000_000  # trainings from different seeds see different pages
PAGES_PER_STAGE = 10_000_000
NOISE = 0.3  # of ideal features, whose size is 1: those of pictures will not be ideal
NAMING = 0.3  # weight of naming what a cell shows beside the distance from its ideal features
READING = 0.5  # weight of reading's loss beside that of the answers


@dataclass(frozen=True)
class Settings:
    """What the result depends on, beside `model.py` and `schedule.py`."""

    seed: int = 0
    processes: int = 2
    questions: int = 28  # per page
    balance: float = 0.01  # weight of the load-balancing loss
    muon_rate: float = 0.01
    adam_rate: float = 2e-3
    shorten: int = 1  # divides the steps of every stage: to try the script


@dataclass
class Progress:
    """What a resumed training needs beside weights and optimisers."""

    stage: int = 0
    step: int = 0
    right: list[float] = field(default_factory=lambda: [0.0] * len(NAMES))  # moving exact match on training questions
    seconds: float = 0.0
    log: list[dict] = field(default_factory=list)


class Trainer:
    """One process of a training."""

    def __init__(self, rank: int, settings: Settings, work: Path, minutes: float | None, resume: bool):
        self.rank, self.settings, self.work = rank, settings, work
        self.model = new_model(settings.seed)
        self.model.model.language_model.set_experts_implementation(dispatch.NAME)
        self.progress = Progress()
        self.vision = dict(self.model.model.visual.named_parameters())
        self.text = dict(self.model.model.language_model.named_parameters()) | {"lm_head": self.model.lm_head.weight}
        self.stop_at = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
        saved = torch.load(work / "state.pt") if resume else None
        if saved:
            self.progress = Progress(**saved["progress"])
            self.model.load_state_dict(saved["model"])
        self._make_optimisers()
        if saved:
            for optimiser, value in zip(self.optimisers, saved["optimisers"], strict=True):
                optimiser.load_state_dict(value)
        self.started = time.monotonic() - self.progress.seconds

    def _make_optimisers(self) -> None:
        """Those of the current stage's task."""
        settings, task = self.settings, STAGES[self.progress.stage].task
        learning = (self.text if task in ("answer", "join") else {}) | (self.vision if task != "answer" else {})
        # Muon is for hidden matrices: not for gates, nor for the rows that stand for words or places
        apart = ("gate.weight", "embed_tokens.weight", "pos_embed.weight", "lm_head")
        named = {name: p for name, p in learning.items() if p.ndim in (2, 3) and not name.endswith(apart)}
        parts = {"gate_up_proj": 2, "qkv.weight": 3}
        splits = [next((n for end, n in parts.items() if name.endswith(end)), 1) for name in named]
        rest = [p for name, p in learning.items() if name not in named]
        self.learning = [*named.values(), *rest]
        self.optimisers = [
            Muon(list(named.values()), settings.muon_rate, splits),
            torch.optim.AdamW(rest, settings.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["initial_lr"] = group["lr"]

    def _update(self, factor: float) -> None:
        average_gradients(self.learning, self.settings.processes)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimiser.step()
            optimiser.zero_grad()

    def _numbers(self, stage: Stage, step: int) -> range:
        """The pages of this process in a step."""
        size = stage.pages // self.settings.processes
        first = self.settings.seed * PAGES_PER_SEED + self.progress.stage * PAGES_PER_STAGE
        first += step * stage.pages + self.rank * size
        return range(first, first + size)

    def _noise(self, step: int) -> torch.Generator:
        """The random numbers of a step."""
        seed = hash((self.settings.seed, self.progress.stage, step, self.rank))
        return torch.Generator().manual_seed(seed)

    def _see(self, pages: list, numbers: range, side: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The vision tower's features and DeepStack features, both [B, side * side, H]."""
        pictures = [render(one, "train", number, side) for one, number in zip(pages, numbers, strict=True)]
        seen = self.model.model.visual(*patches(pictures))
        shape = (len(pages), side * side, -1)
        return seen.pooler_output.view(shape), seen.deepstack_features[0].view(shape)

    def reading_step(self, stage: Stage, step: int) -> dict:
        """Name what the vision tokens show; on whole pages, also where they stand."""
        numbers = self._numbers(stage, step)
        draw = syllables if stage.task == "read" else page
        pages = [draw("train", number, stage.side) for number in numbers]
        features, deep = self._see(pages, numbers, stage.side)
        labels, table = cell_labels(pages, stage.side), self.model.get_input_embeddings().weight.detach()
        loss, right = reading_loss(features, labels, table)
        if stage.task == "place":
            loss = loss + placing_loss(deep, table)
        loss.backward()
        self._update(rate(stage, step))
        return {"loss": loss.item(), "cells": right}

    def answering_step(self, stage: Stage, step: int) -> dict:
        """Answer questions."""
        settings, model, numbers = self.settings, self.model, self._numbers(stage, step)
        pages = [page("train", number, stage.side) for number in numbers]
        # ask more of what goes wrong
        weights = 1.15 - np.array(self.progress.right)
        asked = [
            draw_questions(one, generator("train", number, 1), weights, settings.questions)
            for one, number in zip(pages, numbers, strict=True)
        ]
        batch = pack(asked, stage.side)
        labels, table = cell_labels(pages, stage.side), model.get_input_embeddings().weight
        if stage.task == "answer":
            noise = self._noise(step)
            features, deep = (
                ideal + NOISE * torch.randn(ideal.shape, generator=noise)
                for ideal in ideal_features(labels, table, stage.side)
            )
            reading = 0.0
        else:
            features, deep = self._see(pages, numbers, stage.side)
            reading = reading_loss(features, labels, table.detach())[0] + placing_loss(deep, table.detach())
        logits, output = answer_logits(model, features, deep, batch, output_router_logits=True)
        answer = nn.functional.cross_entropy(logits, batch.labels[batch.labels != IGNORE])
        balance = balance_loss(output.router_logits, model.config.text_config.num_experts_per_tok)
        (answer + settings.balance * balance + READING * reading).backward()
        self._update(rate(stage, step))

        right = right_answers(logits.detach(), batch).double()
        counts = torch.zeros(2, len(NAMES), dtype=torch.float64)
        counts[0].index_add_(0, batch.types, right)
        counts[1].index_add_(0, batch.types, torch.ones_like(right))
        dist.all_reduce(counts)
        for number, (good, count) in enumerate(counts.T.tolist()):
            if count:
                self.progress.right[number] += 0.05 * (good / count - self.progress.right[number])
        return {
            "loss": answer.item(),
            "exact": (counts[0].sum() / counts[1].sum()).item(),
            "types": float(np.mean(self.progress.right)),
            "balance": balance.item(),
        }

    def evaluate(self, pages: int) -> dict:
        """Exact match on dev, the pages shared among the processes."""
        share = pages // self.settings.processes
        records = [None] * self.settings.processes
        dist.all_gather_object(records, evaluate_packed(self.model, "dev", self.rank * share, share))
        return summarise([record for some in records for record in some])

    def save(self) -> None:
        """Write all that a resumed training needs; a kill at any moment leaves the old or the new file."""
        if self.rank:
            return
        self.progress.seconds = time.monotonic() - self.started
        state = {
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        torch.save(state, self.work / "state.tmp")
        os.replace(self.work / "state.tmp", self.work / "state.pt")

    def _out_of_time(self) -> bool:
        """Whether the first process is past its time; all have to stop at the same step."""
        flag = torch.tensor(float(time.monotonic() > self.stop_at))
        dist.broadcast(flag, 0)
        return bool(flag)

    def _note(self, entry: dict) -> None:
        entry = {"stage": self.progress.stage, "step": self.progress.step} | entry
        entry["seconds"] = round(time.monotonic() - self.started, 1)
        self.progress.log.append(entry)
        if not self.rank:
            with (self.work / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")

    def run(self, dev_every: int, dev_pages: int, save_every: int) -> bool:
        """Train to the end, or until the time is up; whether the end was reached."""
        progress = self.progress
        self._note({"settings": asdict(self.settings)})  # a resumed training may have others
        while True:
            stage = STAGES[progress.stage]
            steps = stage.steps // self.settings.shorten
            take = self.answering_step if stage.task in ("answer", "join") else self.reading_step
            name = f"{stage.task}, {stage.side} x {stage.side}"
            with tqdm(total=steps, initial=progress.step, desc=name, disable=self.rank > 0, mininterval=5) as bar:
                while progress.step < steps:
                    figures = take(stage, progress.step)
                    progress.step += 1
                    bar.update()
                    if progress.step % 50 == 0:
                        bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()})
                        self._note(figures)
                    if stage.task == "join" and (progress.step % dev_every == 0 or progress.step == steps):
                        pages = dev_pages if progress.step < steps else 6 * dev_pages
                        self._note({"dev": self.evaluate(pages)})
                    if progress.step % save_every == 0:
                        self.save()
                    if self._out_of_time():
                        self.save()
                        return False
            if stage is STAGES[-1]:
                self.save()
                return True
            self._note({"right": dict(zip(NAMES, progress.right, strict=True))})
            task, progress.stage, progress.step = stage.task, progress.stage + 1, 0
            if STAGES[progress.stage].task != task:
                self._make_optimisers()
            self.save()


def reading_loss(features: torch.Tensor, labels: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, float]:
    """How far features are from the ideal ones, and the share of cells whose tokens are those they resemble most.

    The distance is what counts, as the language model knows ideal features alone; to name the tokens is learned sooner.

    Args:
        features: [B, n, H].
        labels: of `cell_labels`, [B, n, 3].
        table: the words' embeddings, [V, H].
    """
    shown = labels[..., 0] >= 0
    tokens = labels[shown]  # [N, 3]
    # one row of logits for the first two tokens of a cell, one for the third
    tables = torch.stack((table, table.roll(1, -1)))
    logits = -features[shown] @ tables.mT / table.shape[1] ** 0.5  # [2, N, V]
    classes = len(VOCABULARY)
    target = torch.zeros(2, len(tokens), classes + 1)
    target[0].scatter_(1, tokens[:, :2] % (classes + 1), 1.0)
    target[1].scatter_(1, tokens[:, 2:] % (classes + 1), 1.0)
    target = target[..., :-1]  # without what stands for no token
    present = target.sum(-1)  # [2, N]
    named = nn.functional.cross_entropy(
        logits.flatten(0, 1), (target / present.clamp(min=1)[..., None]).flatten(0, 1), reduction="none"
    )
    distances = (features - ideal_features(labels, table, side_of(labels))[0]).pow(2).mean(-1)  # [B, n]
    # with n tokens in a row: are they the n likeliest ones?
    ordered = logits.detach().sort(-1, descending=True).values
    least = ordered.gather(-1, (present.long() - 1).clamp(min=0)[..., None])
    right = ((logits >= least) == target.bool()).all(-1) | (present == 0)
    loss = NAMING * named.sum() / len(tokens) + distances[shown].mean() + distances[~shown].sum() / shown.numel()
    return loss, right.all(0).float().mean().item()


def placing_loss(deep: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of DeepStack features [B, n, H] from the ideal ones."""
    nowhere = deep.new_full((*deep.shape[:2], 3), -1, dtype=torch.int64)
    return nn.functional.mse_loss(deep, ideal_features(nowhere, table, side_of(deep))[1])


def side_of(cells: torch.Tensor) -> int:
    """Vision tokens per side, of [B, side * side, ...]."""
    return isqrt(cells.shape[1])


def export(model, directory: Path) -> None:
    """Write the model as fp16 safetensors, and its processor, as `from_pretrained` reads them."""
    model.model.language_model.set_experts_implementation("eager")
    model.half().save_pretrained(directory)
    save_processor(directory)


def train(rank: int, settings: Settings, work: Path, minutes: float | None, resume: bool, options: dict) -> None:
    """One process: rank 0 also writes the files."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads such memory
    dist.init_process_group(
        "gloo", init_method=f"file://{work}/rendezvous", rank=rank, world_size=settings.processes,
        timeout=timedelta(minutes=10),
    )  # fmt: skip
    trainer = Trainer(rank, settings, work, minutes, resume)
    if trainer.run(**options) and rank == 0:
        result = provenance(torch.device("cpu")) | {
            "seconds": round(trainer.progress.seconds),
            "stages": [asdict(stage) for stage in STAGES],
            "log": trainer.progress.log,
        }
        (work / "training.json").write_text(json.dumps(result, indent=1) + "\n")
        export(trainer.model, work / "checkpoint")
    dist.destroy_process_group()


def main(
    work: Annotated[Path, typer.Option(help="Directory for checkpoints, the log and the result.")],
    processes: Annotated[int, typer.Option(help="Of one thread each.")] = Settings.processes,
    seed: Annotated[int, typer.Option(help="Of the weights and the pages.")] = Settings.seed,
    shorten: Annotated[int, typer.Option(help="Divide all numbers of steps, to try the script.")] = Settings.shorten,
    minutes: Annotated[float | None, typer.Option(help="Save and stop after this time; --resume goes on.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the directory.")] = False,
    dev_every: Annotated[int, typer.Option(help="Steps between looks at dev, in the last stage.")] = 100,
    dev_pages: Annotated[int, typer.Option(help="Dev pages per look; six times as many at the end.")] = 40,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
) -> None:
    """Train the model, or go on training it."""
    settings = Settings(seed=seed, processes=processes, shorten=shorten)
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    (work / "rendezvous").unlink(missing_ok=True)
    options = {"dev_every": dev_every, "dev_pages": dev_pages, "save_every": save_every}
    mp.spawn(train, (settings, work, minutes, resume, options), processes)


if __name__ == "__main__":
    typer.run(main)
