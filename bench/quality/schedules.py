"""Where to prune, how much at each layer, where to use how few experts, what to keep: at equal FLOPs, chosen on dev.

    python bench/quality/schedules.py
    python bench/quality/schedules.py --model seed0 --model seed1 --model seed2 --json schedules.json

The official scripts prune by the same ratio at each of three early layers, and use half of the experts from layer 2 on.
Every candidate costs at most as many FLOPs as that does at the given retention, and spreads them otherwise. Of each
family of candidates, the one that answers best on dev with the first model is tested, with every model: those trained
from another seed had no say. All answer the same questions. Prefills are timed with the first model.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from provenance import provenance, write_json

import fastmmoe
from fastmmoe.methods import FastMMoEConfig
from fastmmoe.scenes.tokenizer import VISION_TOKENS
from fastmmoe.study.accuracy import answers_of
from fastmmoe.study.methods import Method, dense
from fastmmoe.study.study import Session, Settings
from fastmmoe.study.timing import prefill_times
from quality.leads import lead_over, shown

LAYERS = ((1, 2, 3), (1, 3, 5), (2, 3, 4), (2, 4, 6), (2, 3), (2, 4), (3, 4), (3, 5), (2,), (3,), (4,))
STEEPNESS = (1.0, 0.6)  # each stage's keep ratio as a share of the one before
EXPERTS = ((2, 2), (2, 1), (1, 2), (1, 1))  # K_v of 4, and the first layer that uses it
BY_REDUNDANCY = {"keep_by": "redundancy"}
N_TEXT = 10
TIMED_ROUNDS = 25


def cost(session: Session, config: FastMMoEConfig) -> float:
    """FLOPs of a prompt's prefill."""
    return fastmmoe.flops(session.model, N_TEXT, VISION_TOKENS, config).reduced


def config_of(layers: tuple[int, ...], first: float, steepness: float, experts: tuple[int, int]) -> FastMMoEConfig:
    """A schedule that keeps the share `first` at its first layer."""
    ratios = tuple(max(first * steepness**stage, 0.01) for stage in range(len(layers)))
    return FastMMoEConfig(prune_layers=layers, keep_ratios=ratios, vision_top_k=experts[0], reduction_layer=experts[1])


def candidates(session: Session, budget: float, experts: Iterable[tuple[int, int]]) -> list[FastMMoEConfig]:
    """For every set of layers, steepness and experts, the gentlest config that costs no more than the budget."""
    found = []
    for layers, steepness, some in product(LAYERS, STEEPNESS, experts):
        if len(layers) == 1 and steepness < 1:
            continue
        low, high = 0.0, 1.0  # the first stage's keep ratio
        for _ in range(30):
            first = (low + high) / 2
            is_within = cost(session, config_of(layers, first, steepness, some)) <= budget
            low, high = (first, high) if is_within else (low, first)
        if low > 0:
            found.append(config_of(layers, low, steepness, some))
    return found


class Comparison:
    """Families of configs at the cost of the official one at one retention.

    Attributes:
        dev: a row of results per config that was tried.
        test: per family, its best config, that config's rows on test (one per model), its lead over the official one.
    """

    def __init__(self, sessions: list[Session], retention: float):
        self.sessions, self.retention = sessions, retention
        self.dev: dict[FastMMoEConfig, dict] = {}
        self.test: dict[str, dict] = {}
        preset, placements = sessions[0].setting.preset, sessions[0].setting.placements
        experts = {"vision_top_k": preset.vision_top_k, "reduction_layer": preset.reduction_layer}
        self.official = FastMMoEConfig(prune_layers=placements["stages"], retention=retention, **experts)
        self.official_right = self._add("official", self.official)

    def run(self) -> None:
        first, official = self.sessions[0], self.official
        budget = cost(first, official)
        self._choose("keep by redundancy", [replace(official, **BY_REDUNDANCY)])
        self._choose("routing similarity", [replace(official, strategy="routing_similarity")])
        own = [(official.vision_top_k, official.reduction_layer)]
        self._choose("layers", candidates(first, budget, own))
        best = self._choose("layers and experts", candidates(first, budget, EXPERTS))
        self._choose("layers and experts, keep by redundancy", [replace(best, **BY_REDUNDANCY)])
        self._time()

    def _choose(self, family: str, configs: list[FastMMoEConfig]) -> FastMMoEConfig:
        """Test the config that is best on dev."""
        for config in tqdm(configs, f"retention {self.retention}, {family}", unit="config"):
            if config not in self.dev:
                self.dev[config] = self.sessions[0].evaluate("dev", self._method(config))
        best = max(configs, key=lambda config: self.dev[config]["accuracy"])
        self._add(family, best)
        return best

    def _add(self, family: str, config: FastMMoEConfig) -> np.ndarray:
        """Ask the test questions; whether the answers are right, [models, questions]."""
        rows = [session.evaluate("test", self._method(config)) for session in self.sessions]
        right = np.array([answers_of(row) for row in rows], dtype=float)
        self.test[family] = {"config": config.to_dict(), "accuracy": right.mean(), "rows": rows}
        if config != self.official:
            self.test[family] |= lead_over(right, self.official_right)
        return right

    def _time(self) -> None:
        """Prefill times of the configs that were tested, of the dense model's."""
        first = self.sessions[0]
        batches = first.questions("test")[1]
        batch = batches[len(batches) // 2].first(first.settings.timing_batch)
        configs = [FastMMoEConfig.from_dict(found["config"]) for found in self.test.values()]
        methods = [dense(), *(self._method(config) for config in configs)]
        _, *rows = prefill_times(first.model, batch, methods, TIMED_ROUNDS)
        for found, row in zip(self.test.values(), rows, strict=True):
            found |= {name: row[name] for name in ("time_ratio", "time_ratio_quartiles", "rounds", "batch")}

    def _method(self, config: FastMMoEConfig) -> Method:
        return Method("schedule", "", self.retention, (config,))

    def show(self) -> None:
        for family, found in self.test.items():
            config, flops = FastMMoEConfig.from_dict(found["config"]), found["rows"][0]["flops_ratio"]
            ratios = ", ".join(f"{ratio:.3f}" for ratio in config.stage_keep_ratios)
            costs = f"{flops:.3f} of the FLOPs and {found['time_ratio']:.3f} of the prefill time"
            print(f"{family}: {found['accuracy']:.3f} at {costs}")
            print(f"  at {config.prune_layers} keep {ratios}; K_v {config.vision_top_k} from {config.reduction_layer}")
            if "lead" in found:
                print(f"  leads by {shown(found)}")


@torch.inference_mode()
def main(
    model: Annotated[list[str] | None, typer.Option(help="Checkpoints; repeat. The package's own by default.")] = None,
    retention: Annotated[list[float] | None, typer.Option(help="Of the official schedule; repeat.")] = None,
    n: Annotated[int, typer.Option(help="Test questions.")] = 2000,
    dev_n: Annotated[int, typer.Option(help="Dev questions.")] = 1000,
    seed: Annotated[int, typer.Option(help="Which scenes; the study's is 0.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Choose on dev with the first model, report on test with all."""
    sessions = [Session(Settings(model=one, n=n, dev_n=dev_n, seed=seed)) for one in model or (None,)]
    head = provenance(torch.device("cpu")) | {"models": [session.describe_model() for session in sessions]}
    results = []
    for share in retention or (0.5, 0.25):
        comparison = Comparison(sessions, share)
        comparison.run()
        comparison.show()
        results.append({"retention": share, "dev": list(comparison.dev.values()), "test": comparison.test})
        write_json(head | {"n": n, "dev_n": dev_n, "seed": seed, "results": results}, json_path)


if __name__ == "__main__":
    typer.run(main)
