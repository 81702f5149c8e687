"""Train the small model of `fastmmoe/scenes/checkpoint/`: about half an hour on two CPU cores.

    python bench/quality/train.py --work /tmp/quality
    python bench/quality/train.py --work /tmp/quality --resume

Two phases. First the vision tower and the projector learn to name what every vision token shows, with a head that is
thrown away. Then the language model learns to answer, at first with the vision tower frozen. Every process computes
its share of a batch on one thread and the gradients are averaged: two threads of one process wait for each other as
soon as anything else runs on the machine. The data of a step depend on its number and on the answers so far, which a
checkpoint holds, so a resumed training goes on as if it had not stopped. The last step's weights are the result; dev
is only watched, test is not touched.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.multiprocessing as mp
import typer
from torch import nn
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from fastmmoe.scenes import TYPES, scene
from fastmmoe.scenes.pictures import CELLS, COLOURS
from fastmmoe.scenes.tokenizer import VOCABULARY
from quality import dispatch, schedule
from quality.batches import to_pixels, token_labels, training_batch
from quality.evaluate import answer_logits, evaluate_packed, summarise
from quality.model import new_model
from quality.muon import Muon
from quality.processor import save_processor
from quality.scoring import IGNORE
from quality.trainer import BaseTrainer, balance_loss, run_process

SCENES_PER_SEED = 100_000_000  # trainings from different seeds see different scenes
SECOND_PHASE_SCENES = 10_000_000  # of a seed's scenes, those of the second phase start here
HEAD = (12, 7, CELLS, CELLS)  # classes of `token_labels`
HEAD_WORDS = (
    [str(digit) for digit in range(10)],
    list(COLOURS),
    [f"r{row + 1}" for row in range(CELLS)],
    [f"c{column + 1}" for column in range(CELLS)],
)


@dataclass(frozen=True)
class Settings:
    """What the result depends on, beside `model.py` and `schedule.py`."""

    seed: int = 0
    processes: int = 2
    vision_steps: int = 550
    vision_batch: int = 48
    steps: int = 4000
    batch: int = 16
    questions: int = 14  # per picture
    balance: float = 0.01  # weight of the load-balancing loss
    muon_rate: float = 0.006
    adam_rate: float = 2e-3
    vision_rate: float = 6e-4  # of the vision tower in the second phase


@dataclass
class Progress:
    """What a resumed training needs beside weights and optimisers."""

    phase: int = 1
    step: int = 0
    right: list[float] = field(default_factory=lambda: [0.0] * len(TYPES))  # moving exact match on training questions
    seconds: float = 0.0
    log: list[dict] = field(default_factory=list)


class Trainer(BaseTrainer):
    """One process of this training."""

    place = ("phase", "step")

    def __init__(self, rank: int, settings: Settings, work: Path, minutes: float | None, resume: bool):
        self.model = new_model(settings.seed)
        self.model.model.language_model.set_experts_implementation(dispatch.NAME)
        self.head = nn.Linear(self.model.config.text_config.hidden_size, sum(HEAD))
        inner = self.model.model
        self.vision = [*inner.vision_tower.parameters(), *inner.multi_modal_projector.parameters()]
        self.text = [*inner.language_model.parameters(), self.model.lm_head.weight]
        modules = {"model": self.model, "head": self.head}
        super().__init__(rank, settings, work, minutes, resume, modules, Progress())

    def make_optimisers(self) -> list[torch.optim.Optimizer]:
        """Those of the current phase."""
        settings = self.settings
        if self.progress.phase == 1:
            return [torch.optim.AdamW([*self.vision, *self.head.parameters()], settings.adam_rate)]
        # Muon is for hidden matrices: not for gates, nor for the rows that stand for words
        named = [
            (name, p)
            for name, p in self.model.model.language_model.named_parameters()
            if p.ndim >= 2 and not name.endswith(("gate.weight", "embed_tokens.weight"))
        ]
        matrices = [p for _, p in named]
        splits = [2 if name.endswith("gate_up_proj") else 1 for name, _ in named]
        rest = [p for p in self.text if all(p is not matrix for matrix in matrices)]
        adam = [{"params": rest, "lr": settings.adam_rate}, {"params": self.vision, "lr": settings.vision_rate}]
        return [
            Muon(matrices, settings.muon_rate, splits),
            torch.optim.AdamW(adam, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    @torch.no_grad()
    def _join(self) -> None:
        """Make what the first phase learned easy to use for the language model.

        Vision tokens get mean 0 and unit size by the projector's last layer. Digits, colours, rows and columns get
        the directions by which the head tells them apart: a word resembles the vision tokens that show it.
        """
        inner = self.model.model
        tokens = inner.get_image_features(to_pixels([scene("train", number) for number in range(64)])).pooler_output
        mean = tokens.mean((0, 1))
        size = (tokens - mean).pow(2).mean().sqrt()
        last = inner.multi_modal_projector.linear_2
        last.weight.div_(size)
        last.bias.sub_(mean).div_(size)
        for table in (self.model.get_input_embeddings().weight, self.model.lm_head.weight):
            length = table.norm(dim=-1).mean()
            for part, words in zip(self.head.weight.split(HEAD), HEAD_WORDS, strict=True):
                directions = nn.functional.normalize(part - part.mean(0), dim=-1)
                for word, direction in zip(words, directions, strict=False):  # shapes and nothing have no word
                    table[VOCABULARY[word]] = length * direction

    def vision_step(self, step: int) -> dict:
        """Name what the vision tokens show."""
        size = self.settings.vision_batch // self.settings.processes
        first = self.settings.seed * SCENES_PER_SEED + step * self.settings.vision_batch + self.rank * size
        scenes = [scene("train", number) for number in range(first, first + size)]
        labels = token_labels(scenes)
        logits = self.head(self.model.model.get_image_features(to_pixels(scenes)).pooler_output)
        # nine tokens in ten show nothing
        weight = torch.where(labels[..., 0] == 11, 0.1, 1.0)
        parts = [
            nn.functional.cross_entropy(part.flatten(0, 1), labels[..., number].flatten(), reduction="none")
            for number, part in enumerate(logits.split(HEAD, -1))
        ]
        loss = sum((part * weight.flatten()).sum() for part in parts) / weight.sum()
        loss.backward()
        self.update([*self.vision, *self.head.parameters()], schedule.rate(step, self.settings.vision_steps, 0.5))
        digits = labels[..., 0] < 10
        return {
            "loss": loss.item(),
            "digits": (logits[..., :12].argmax(-1) == labels[..., 0])[digits].float().mean().item(),
        }

    def text_step(self, step: int) -> dict:
        """Answer questions."""
        settings, model = self.settings, self.model
        size = schedule.pictures(step, settings.steps, settings.batch) // settings.processes
        first = settings.seed * SCENES_PER_SEED + SECOND_PHASE_SCENES + step * settings.batch + self.rank * size
        # ask more of what goes wrong
        weights = 1.15 - np.array(self.progress.right)
        batch = training_batch(first, size, schedule.digits(step), weights, settings.questions)
        learns_to_see = step >= schedule.UNFREEZE * settings.steps
        with torch.set_grad_enabled(learns_to_see):
            features = model.model.get_image_features(batch.pixels).pooler_output
        logits, output = answer_logits(model, features, batch, output_router_logits=True)
        answer = nn.functional.cross_entropy(logits, batch.labels[batch.labels != IGNORE])
        balance = balance_loss(output.router_logits, model.config.text_config.num_experts_per_tok)
        (answer + settings.balance * balance).backward()
        factor = schedule.rate(step, settings.steps, 0.4)
        self.update(self.text + self.vision if learns_to_see else self.text, factor)

        exact = self.count_right(logits.detach(), batch)
        probabilities = torch.stack([one.detach().softmax(-1) for one in output.router_logits])
        entropy = torch.special.entr(probabilities).sum(-1).mean()
        return {
            "loss": answer.item(),
            "exact": exact,
            "balance": balance.item(),
            "routing_entropy": entropy.item(),
        }

    def evaluate(self, scenes: int) -> dict:
        """Exact match on dev, the scenes shared among the processes."""
        self.model.eval()
        records = self.gather(lambda first, count: evaluate_packed(self.model, "dev", first, count), scenes)
        self.model.train()
        return summarise(records)

    def run(self, dev_every: int, dev_scenes: int, save_every: int) -> bool:
        """Train to the end, or until the time is up; whether the end was reached."""
        progress, settings = self.progress, self.settings
        self.note({"settings": asdict(settings)})  # a resumed training may have others
        for phase, steps, take in ((1, settings.vision_steps, self.vision_step), (2, settings.steps, self.text_step)):
            if progress.phase > phase:
                continue
            if progress.phase < phase:
                progress.phase, progress.step = phase, 0
                self._join()
                self.renew_optimisers()
            with tqdm(total=steps, initial=progress.step, desc=f"phase {phase}", disable=self.rank > 0) as bar:
                while progress.step < steps:
                    figures = take(progress.step)
                    progress.step += 1
                    bar.update()
                    bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()})
                    if phase == 1 and progress.step % 50 == 0:
                        self.note(figures)
                    if phase == 2 and (progress.step % dev_every == 0 or progress.step == steps):
                        scenes = dev_scenes if progress.step < steps else 6 * dev_scenes
                        self.note(figures | {"dev": self.evaluate(scenes)})
                    if progress.step % save_every == 0 or progress.step == steps:
                        self.save()
                    if self.is_out_of_time():
                        self.save()
                        return False
        return True


def train(rank: int, settings: Settings, work: Path, minutes: float | None, resume: bool, options: dict) -> None:
    """One process."""
    run_process(Trainer, save_processor, rank, settings, work, minutes, resume, options)


def main(
    work: Annotated[Path, typer.Option(help="Directory for checkpoints, the log and the result.")],
    steps: Annotated[int, typer.Option(help="Of the second phase.")] = Settings.steps,
    vision_steps: Annotated[int, typer.Option(help="Of the first phase.")] = Settings.vision_steps,
    processes: Annotated[int, typer.Option(help="Of one thread each.")] = Settings.processes,
    seed: Annotated[int, typer.Option(help="Of the weights and the scenes.")] = Settings.seed,
    balance: Annotated[float, typer.Option(help="Weight of the load-balancing loss.")] = Settings.balance,
    minutes: Annotated[float | None, typer.Option(help="Save and stop after this time; --resume goes on.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the directory.")] = False,
    dev_every: Annotated[int, typer.Option(help="Steps between looks at dev.")] = 100,
    dev_scenes: Annotated[int, typer.Option(help="Dev pictures per look; six times as many at the end.")] = 50,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
) -> None:
    """Train the model, or go on training it."""
    settings = Settings(seed=seed, processes=processes, vision_steps=vision_steps, steps=steps, balance=balance)
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    (work / "rendezvous").unlink(missing_ok=True)
    options = {"dev_every": dev_every, "dev_scenes": dev_scenes, "save_every": save_every}
    mp.spawn(train, (settings, work, minutes, resume, options), processes)


if __name__ == "__main__":
    typer.run(main)
