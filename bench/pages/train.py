"""Train the pages' model: about two and a half hours on two CPU cores.

    python bench/pages/train.py --work /tmp/pages
    python bench/pages/train.py --work /tmp/pages --resume

First the language model learns to answer, on vision tokens that say in its own words what they show, pages small at
first. Then the vision tower learns to say that, from pictures: of letters in every combination but the words of dev
and test. Then both go on together, at the end about words made up of halves: training's own it knows by heart. Every
process computes its share of a batch on one thread and the gradients are averaged. The data of a step depend on its
number and on the answers so far, which a checkpoint holds, so a resumed training goes on as if it had not stopped. The
last step's weights are the result; dev is only watched, test is not touched.
"""

import sys
from dataclasses import asdict, dataclass, field
from math import isqrt
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.multiprocessing as mp
import typer
from torch import nn
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from quality import dispatch
from quality.muon import Muon
from quality.scoring import IGNORE
from quality.trainer import BaseTrainer, balance_loss, run_process

from pages.batches import NAMES, cell_labels, draw_questions, ideal_features, pack, patches
from pages.evaluate import answer_logits, evaluate_packed, summarise
from pages.layout import Page, generator, page, syllables
from pages.model import new_model
from pages.processor import save_processor
from pages.render import render
from pages.schedule import STAGES, Stage, rate
from pages.words import VOCABULARY, made_up

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


class Trainer(BaseTrainer):
    """One process of this training."""

    place = ("stage", "step")

    def __init__(self, rank: int, settings: Settings, work: Path, minutes: float | None, resume: bool):
        self.model = new_model(settings.seed)
        self.model.model.language_model.set_experts_implementation(dispatch.NAME)
        self.vision = dict(self.model.model.visual.named_parameters())
        self.text = dict(self.model.model.language_model.named_parameters()) | {"lm_head": self.model.lm_head.weight}
        super().__init__(rank, settings, work, minutes, resume, {"model": self.model}, Progress())

    def make_optimisers(self) -> list[torch.optim.Optimizer]:
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
        return [
            Muon(list(named.values()), settings.muon_rate, splits),
            torch.optim.AdamW(rest, settings.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def _numbers(self, stage: Stage, step: int) -> range:
        """The pages of this process in a step."""
        size = stage.pages // self.settings.processes
        first = self.settings.seed * PAGES_PER_SEED + self.progress.stage * PAGES_PER_STAGE
        first += step * stage.pages + self.rank * size
        return range(first, first + size)

    def _pages(self, stage: Stage, numbers: range) -> list[Page]:
        pool = made_up() if stage.made_up else None
        return [page("train", number, stage.side, pool) for number in numbers]

    def _see(self, pages: list[Page], numbers: range, side: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The vision tower's features and DeepStack features, both [B, side * side, H]."""
        pictures = [render(one, "train", number, side) for one, number in zip(pages, numbers, strict=True)]
        seen = self.model.model.visual(*patches(pictures))
        shape = (len(pages), side * side, -1)
        return seen.pooler_output.view(shape), seen.deepstack_features[0].view(shape)

    def reading_step(self, stage: Stage, step: int) -> dict:
        """Name what the vision tokens show; on whole pages, also where they stand."""
        numbers = self._numbers(stage, step)
        if stage.task == "read":
            pages = [syllables("train", number, stage.side) for number in numbers]
        else:
            pages = self._pages(stage, numbers)
        features, deep = self._see(pages, numbers, stage.side)
        labels, table = cell_labels(pages, stage.side), self.model.get_input_embeddings().weight.detach()
        loss, right = reading_loss(features, labels, table)
        if stage.task == "place":
            loss = loss + placing_loss(deep, table)
        loss.backward()
        self.update(self.learning, rate(stage, step))
        return {"loss": loss.item(), "cells": right}

    def answering_step(self, stage: Stage, step: int) -> dict:
        """Answer questions."""
        settings, model, numbers = self.settings, self.model, self._numbers(stage, step)
        pages = self._pages(stage, numbers)
        # ask more of what goes wrong
        weights = 1.15 - np.array(self.progress.right)
        asked = [
            draw_questions(one, generator("train", number, 1), weights, settings.questions)
            for one, number in zip(pages, numbers, strict=True)
        ]
        batch = pack(asked, stage.side)
        labels, table = cell_labels(pages, stage.side), model.get_input_embeddings().weight
        if stage.task == "answer":
            noise = torch.Generator().manual_seed(numbers.start)
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
        self.update(self.learning, rate(stage, step))

        return {
            "loss": answer.item(),
            "exact": self.count_right(logits.detach(), batch),
            "types": float(np.mean(self.progress.right)),
            "balance": balance.item(),
        }

    def evaluate(self, pages: int) -> dict:
        """Exact match on dev, the pages shared among the processes."""
        records = self.gather(lambda first, count: evaluate_packed(self.model, "dev", first, count), pages)
        return summarise(records)

    def run(self, dev_every: int, dev_pages: int, save_every: int) -> bool:
        """Train to the end, or until the time is up; whether the end was reached."""
        progress = self.progress
        # a resumed training may have others
        self.note({"settings": asdict(self.settings), "stages": [asdict(stage) for stage in STAGES]})
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
                        self.note(figures)
                    if stage.task == "join" and (progress.step % dev_every == 0 or progress.step == steps):
                        pages = dev_pages if progress.step < steps else 6 * dev_pages
                        self.note({"dev": self.evaluate(pages)})
                    if progress.step % save_every == 0:
                        self.save()
                    if self.is_out_of_time():
                        self.save()
                        return False
            if stage is STAGES[-1]:
                self.save()
                return True
            self.note({"right": dict(zip(NAMES, progress.right, strict=True))})
            task, progress.stage, progress.step = stage.task, progress.stage + 1, 0
            if STAGES[progress.stage].task != task:
                self.renew_optimisers()
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


def train(rank: int, settings: Settings, work: Path, minutes: float | None, resume: bool, options: dict) -> None:
    """One process."""
    run_process(Trainer, save_processor, rank, settings, work, minutes, resume, options)


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
