"""Windows that are blocks of the picture instead of neighbours in raster order: do they answer better?

    python bench/quality/windows.py
    python bench/quality/windows.py --model seed0 --model seed1 --model seed2 --json windows.json

The paper cuts windows from the tokens of a run in the order of the sequence, anew at each stage. Here they are blocks
of rows x columns, cut anew from the survivors in the order of the blocks, or else what is left of the picture's own
blocks. For each way to rank tokens, the windows that answer best on dev with the first model, in the mean of several
places and retentions, are tested against the official ones with every model; and the rankings, with the official
windows, against the paper's. Counts, and so FLOPs, are the same.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from math import isqrt
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from provenance import provenance, write_json

from fastmmoe.config import checked, int_from, tuple_of
from fastmmoe.methods import FastMMoEConfig
from fastmmoe.methods.fastmmoe import FastMMoEPruning
from fastmmoe.methods.method import Pruning, StageInput
from fastmmoe.scenes.tokenizer import VISION_TOKENS
from fastmmoe.study.accuracy import answers_of
from fastmmoe.study.methods import Method
from fastmmoe.study.study import Session, Settings
from fastmmoe_kernels import PrunedBatch, VisionLayout
from quality.leads import lead_over, shown

SIDE = isqrt(VISION_TOKENS)  # of a picture, in tokens
RANKINGS = {
    "importance": {},
    "redundancy": {"keep_by": "redundancy"},
    "routing similarity": {"strategy": "routing_similarity"},
}
BLOCKS = ((1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (1, 5), (3, 3), (2, 5), (1, 10))  # rows, columns
PLACEMENTS = ("stages", "early")
RETENTIONS = (0.5, 0.25)


@dataclass(frozen=True)
class BlockConfig(FastMMoEConfig):
    """FastMMoE whose windows are blocks of the picture; for prompts with one picture of SIDE x SIDE tokens.

    Args:
        block: rows and columns of a block; `window` becomes their product.
        regroup: cut windows anew from the survivors in the order of the blocks; else a window is what is left of a
            block.
    """

    block: tuple[int, ...] = checked((1, 3), tuple_of(int_from(1)))
    regroup: bool = checked(True, lambda name, value: value)

    def __post_init__(self):
        super().__post_init__()
        rows, columns = self.block
        object.__setattr__(self, "window", rows * columns)

    def pruning(self) -> Pruning:
        return _BlockPruning(self)


class _BlockPruning(FastMMoEPruning):
    """Prune in the order of the blocks, and put the survivors back in that of the sequence."""

    def read_prompt(self, embeddings: Callable[[], torch.Tensor], layout: VisionLayout, back: int) -> torch.Tensor:
        """Position of each sample's first vision token, int64 [B, 1]."""
        if set(layout.n_vision) != {SIDE**2}:
            raise ValueError(f"layout: expected one picture of {SIDE**2} tokens per sample, got {layout.n_vision}")
        return layout.vision_mask.int().argmax(1, keepdim=True)

    def prune(self, tokens: StageInput) -> PrunedBatch:
        layout, first = tokens.layout, tokens.prompt
        vision = layout.vision_mask
        source = tokens.source
        if source is None:
            source = torch.arange(layout.width).expand(layout.batch_size, -1)
        block, place = blocks_and_places(*self.config.block)
        token = torch.where(vision, source - first, 0)  # of the picture
        key = _sequence_key(source, layout.valid_mask, layout)
        # between the tokens in front of the picture and those behind it
        order = torch.where(vision, first + place[token] / len(place), key).argsort(dim=1, stable=True)
        run_rank = layout.run_rank if self.config.regroup else _restarts(torch.where(vision, block[token], -1), order)
        pruned = super().prune(
            replace(
                tokens,
                hidden=_take(tokens.hidden, order),
                residual=_take(tokens.residual, order),
                seen=_take(tokens.seen, order),
                source=_take(source, order),
                layout=replace(layout, run_rank=run_rank),
            )
        )
        back = _sequence_key(pruned.index, pruned.valid, layout).argsort(dim=1, stable=True)
        return pruned._replace(
            hidden=_take(pruned.hidden, back),
            residual=_take(pruned.residual, back),
            index=_take(pruned.index, back),
            merged=_take(pruned.merged, back),
            # in the order of the sequence the picture is one run again
            layout=replace(pruned.layout, run_rank=_ranks(pruned.layout.vision_mask)),
        )


def blocks_and_places(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every token of the picture: its block, and its place in the order of the blocks; both int64 [SIDE * SIDE]."""
    token = torch.arange(SIDE**2)
    row, column = token // SIDE, token % SIDE
    block = row // rows * SIDE + column // columns
    # stable: raster order within a block
    return block, block.argsort(stable=True).argsort()


def _ranks(vision: torch.Tensor) -> torch.Tensor:
    """`VisionLayout.run_rank` of samples with one run, int32 [B, n]."""
    return torch.where(vision, vision.cumsum(1) - 1, -1).to(torch.int32)


def _sequence_key(position: torch.Tensor, valid: torch.Tensor, layout: VisionLayout) -> torch.Tensor:
    """What sorts tokens by their position and leaves padding on its side, float32 [B, n]."""
    return torch.where(valid, position, -1.0 if layout.padding_side == "left" else float("inf"))


def _take(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Tokens in another order: [B, n] or [B, n, features], order [B, n]."""
    if tensor.dim() == 2:
        return tensor.gather(1, order)
    return tensor.gather(1, order.unsqueeze(-1).expand(-1, -1, tensor.shape[2]))


def _restarts(block: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Each token's rank in its block, once they are in order; -1 without a block. int32 [B, n]."""
    block = _take(block, order)
    position = torch.arange(block.shape[1]).expand_as(block)
    begins = torch.ones_like(block, dtype=torch.bool)
    begins[:, 1:] = block[:, 1:] != block[:, :-1]
    start = torch.where(begins, position, 0).cummax(1).values
    return torch.where(block >= 0, position - start, -1).to(torch.int32)


class Comparison:
    """The windows for one ranking.

    Attributes:
        dev: a row per windows that were tried: its accuracy at every place, and the mean.
        test: the best windows, their accuracy at every place, and their lead over the official ones.
        official: whether the official windows' answers to the test questions are right, [places, models, questions].
    """

    def __init__(self, sessions: list[Session], changes: dict[str, Any]):
        self.sessions, self.changes = sessions, changes
        setting = sessions[0].setting
        experts = {"vision_top_k": setting.preset.vision_top_k, "reduction_layer": setting.preset.reduction_layer}
        self.places = [
            {"prune_layers": setting.placements[placement], "retention": retention} | experts
            for placement, retention in product(PLACEMENTS, RETENTIONS)
        ]
        self.dev: list[dict[str, Any]] = []
        self.test: dict[str, Any] = {}

    def run(self, name: str) -> None:
        for block, regroup in tqdm(list(product(BLOCKS, (True, False))), name, unit="windows"):
            rows = [self._evaluate(self.sessions[0], "dev", place, block, regroup) for place in self.places]
            accuracies = [row["accuracy"] for row in rows]
            mean = float(np.mean(accuracies))
            self.dev.append({"block": block, "regroup": regroup, "accuracy": mean, "accuracies": accuracies})
        best = max(self.dev, key=lambda row: row["accuracy"])
        self.official = self._test((1, 3), True)
        right = self._test(best["block"], best["regroup"])
        self.test = {
            "block": best["block"],
            "regroup": best["regroup"],
            "accuracies": right.mean((1, 2)).tolist(),
            # the places ask the same questions
            **lead_over(right.mean(0), self.official.mean(0)),
        }

    def against(self, paper: "Comparison") -> list[dict[str, Any]]:
        """This ranking with the official windows, at every place: accuracy, and lead over another ranking."""
        return [
            {"accuracy": ours.mean(), **lead_over(ours, theirs)}
            for ours, theirs in zip(self.official, paper.official, strict=True)
        ]

    def show(self, name: str) -> None:
        for row in sorted(self.dev, key=lambda row: -row["accuracy"]):
            scope = "anew" if row["regroup"] else "fixed"
            by_place = " ".join(f"{accuracy:.3f}" for accuracy in row["accuracies"])
            print(f"{name}: {row['block'][0]} x {row['block'][1]:<2} {scope:5} {row['accuracy']:.4f} ({by_place})")
        print(f"  on test, the first leads the official windows by {shown(self.test)}")

    def _test(self, block: tuple[int, int], regroup: bool) -> np.ndarray:
        """Whether the answers to the test questions are right, float [places, models, questions]."""
        rows = [[self._evaluate(one, "test", place, block, regroup) for one in self.sessions] for place in self.places]
        return np.array([[answers_of(row) for row in models] for models in rows], dtype=float)

    def _evaluate(self, session: Session, split: str, place: dict, block: tuple[int, int], regroup: bool) -> dict:
        config = BlockConfig(**place, **self.changes, block=block, regroup=regroup)
        return session.evaluate(split, Method("windows", configs=(config,)))


@torch.inference_mode()
def main(
    model: Annotated[list[str] | None, typer.Option(help="Checkpoints; repeat. The package's own by default.")] = None,
    n: Annotated[int, typer.Option(help="Test questions.")] = 2000,
    dev_n: Annotated[int, typer.Option(help="Dev questions.")] = 1000,
    seed: Annotated[int, typer.Option(help="Which scenes; the study's is 0, the schedules' 1.")] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Choose windows on dev with the first model, report on test with all."""
    sessions = [Session(Settings(model=one, n=n, dev_n=dev_n, seed=seed)) for one in model or (None,)]
    head = provenance(torch.device("cpu")) | {"models": [session.describe_model() for session in sessions]}
    results, paper = {}, None
    for name, changes in RANKINGS.items():
        comparison = Comparison(sessions, changes)
        comparison.run(name)
        comparison.show(name)
        paper = paper or comparison
        rankings = comparison.against(paper)
        for place, row in zip(comparison.places, rankings, strict=True):
            where = f"{place['prune_layers']}, {place['retention']} left"
            print(f"  {where}: {row['accuracy']:.3f}, leads the paper's ranking by {shown(row)}")
        results[name] = {
            "places": comparison.places,
            "dev": comparison.dev,
            "official_windows": rankings,
            "best_windows": comparison.test,
        }
        write_json(head | {"n": n, "dev_n": dev_n, "seed": seed, "results": results}, json_path)


if __name__ == "__main__":
    typer.run(main)
