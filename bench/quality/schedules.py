"""Where to prune, how much at each layer, and where to use how few experts, at equal FLOPs: chosen on dev, then tested.

    python bench/quality/schedules.py --json bench/results/quality/schedules.json
    python bench/quality/schedules.py --model DIRECTORY --model DIRECTORY

The official scripts prune by the same ratio at each of three early layers, and use half of the experts from layer 2 on.
Every candidate here costs as many FLOPs as that does at the given retention, and spreads them otherwise. The first
model's dev answers choose; every model, trained from another seed, is tested on the same questions.
"""

import sys
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
from fastmmoe.analysis.accuracy import answers_of, paired_difference
from fastmmoe.analysis.methods import Method
from fastmmoe.analysis.study import Session, Settings
from fastmmoe.config import FastMMoEConfig
from fastmmoe.scenes.tokenizer import VISION_TOKENS

LAYERS = ((1, 2, 3), (1, 2, 4), (1, 3, 5), (1, 2), (1, 3), (1, 4), (2, 3), (2, 4))
STEEPNESS = (1.0, 0.7, 0.45)  # each stage's keep ratio as a share of the one before
EXPERTS = ((2, 2), (2, 1), (1, 3), (1, 4))  # K_v of 4, and the first layer that uses it
N_TEXT = 10


def cost(session: Session, config: FastMMoEConfig) -> float:
    """FLOPs of a prompt's prefill."""
    return fastmmoe.flops(session.model, N_TEXT, VISION_TOKENS, config).reduced


def config_of(layers: tuple[int, ...], first: float, steepness: float, experts: tuple[int, int]) -> FastMMoEConfig:
    """A schedule that keeps the share `first` at its first layer."""
    ratios = tuple(max(first * steepness**stage, 0.01) for stage in range(len(layers)))
    return FastMMoEConfig(prune_layers=layers, keep_ratios=ratios, vision_top_k=experts[0], reduction_layer=experts[1])


def candidates(session: Session, budget: float) -> list[FastMMoEConfig]:
    """For every set of layers, steepness and experts, the gentlest config that costs no more than the budget."""
    found = []
    for layers, steepness, experts in product(LAYERS, STEEPNESS, EXPERTS):
        low, high = 0.0, 1.0  # the first stage's keep ratio
        for _ in range(30):
            first = (low + high) / 2
            is_within = cost(session, config_of(layers, first, steepness, experts)) <= budget
            low, high = (first, high) if is_within else (low, first)
        if low > 0:
            found.append(config_of(layers, low, steepness, experts))
    return found


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
    first = sessions[0]
    preset = first.setting.preset
    experts = {"vision_top_k": preset.vision_top_k, "reduction_layer": preset.reduction_layer}
    results = []
    for share in retention or (0.5, 0.25):
        official = FastMMoEConfig(prune_layers=first.setting.placements["stages"], retention=share, **experts)
        configs = candidates(first, cost(first, official))
        rows = [
            first.evaluate("dev", Method("schedule", "", share, (config,)))
            for config in tqdm([official, *configs], f"retention {share}", unit="schedule")
        ]
        best = max(rows, key=lambda row: row["accuracy"])
        chosen = FastMMoEConfig.from_dict({k: v for k, v in best["config"].items() if k != "type"})
        test = [
            [session.evaluate("test", Method("schedule", "", share, (config,))) for config in (chosen, official)]
            for session in sessions
        ]
        ours, theirs = (np.array([answers_of(rows[side]) for rows in test], dtype=float) for side in (0, 1))
        # the models answer the same questions: a question's mean over the models is one draw
        difference, error = paired_difference(ours.mean(0), theirs.mean(0))
        one_by_one = (ours - theirs).mean(1).tolist()
        experts_chosen = f"K_v {chosen.vision_top_k} from layer {chosen.reduction_layer}"
        print(f"retention {share}: {chosen.prune_layers} {chosen.keep_ratios}, {experts_chosen}")
        print(f"  test: {ours.mean():.3f} at {test[0][0]['flops_ratio']:.3f} of the FLOPs")
        print(f"  official: {theirs.mean():.3f} at {test[0][1]['flops_ratio']:.3f}, {difference:+.4f} +- {error:.4f}")
        print(f"  per model: {' '.join(f'{one:+.4f}' for one in one_by_one)}")
        results.append(
            {
                "retention": share,
                "dev": rows,
                "test": [{"chosen": one, "official": other} for one, other in test],
                "test_difference": {"mean": difference, "standard_error": error, "per_model": one_by_one},
            }
        )
    models = [session.describe_model() for session in sessions]
    head = provenance(torch.device("cpu")) | {"models": models, "n": n, "dev_n": dev_n, "seed": seed}
    write_json(head | {"results": results}, json_path)


if __name__ == "__main__":
    typer.run(main)
