"""Where to prune, and how much at each layer, at equal FLOPs: compared on dev, the best reported on test.

    python bench/quality/schedules.py --json bench/results/quality/schedules.json

The official scripts prune by the same ratio at each of three early layers. Every candidate here costs as many FLOPs as
that does at the given retention, fewer experts included in both, and spreads them otherwise.
"""

import sys
from itertools import product
from pathlib import Path
from typing import Annotated, Any

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
N_TEXT = 10


def cost(session: Session, config: FastMMoEConfig) -> float:
    """FLOPs of a prompt's prefill."""
    return fastmmoe.flops(session.model, N_TEXT, VISION_TOKENS, config).reduced


def candidates(session: Session, budget: float, experts: dict[str, Any]) -> list[FastMMoEConfig]:
    """For every set of layers and steepness, the gentlest config that costs no more than the budget."""
    found = []
    for layers, steepness in product(LAYERS, STEEPNESS):
        low, high = 0.0, 1.0  # the first stage's keep ratio
        for _ in range(30):
            first = (low + high) / 2
            ratios = tuple(max(first * steepness**stage, 0.01) for stage in range(len(layers)))
            config = FastMMoEConfig(prune_layers=layers, keep_ratios=ratios, **experts)
            low, high = (first, high) if cost(session, config) <= budget else (low, first)
        ratios = tuple(max(low * steepness**stage, 0.01) for stage in range(len(layers)))
        config = FastMMoEConfig(prune_layers=layers, keep_ratios=ratios, **experts)
        if low > 0 and cost(session, config) <= budget:
            found.append(config)
    return found


@torch.inference_mode()
def main(
    retention: Annotated[list[float] | None, typer.Option(help="Of the official schedule; repeat.")] = None,
    n: Annotated[int, typer.Option(help="Test questions.")] = 2000,
    dev_n: Annotated[int, typer.Option(help="Dev questions.")] = 1000,
    seed: Annotated[int, typer.Option(help="Which scenes; the study's is 0.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Choose on dev, report on test."""
    session = Session(Settings(n=n, dev_n=dev_n, seed=seed))
    preset = session.setting.preset
    experts = {"vision_top_k": preset.vision_top_k, "reduction_layer": preset.reduction_layer}
    results = []
    for share in retention or (0.5, 0.25):
        official = FastMMoEConfig(prune_layers=session.setting.placements["stages"], retention=share, **experts)
        configs = candidates(session, cost(session, official), experts)
        rows = [
            session.evaluate("dev", Method("schedule", "", share, (config,)))
            for config in tqdm([official, *configs], f"retention {share}", unit="schedule")
        ]
        best = max(rows, key=lambda row: row["accuracy"])
        chosen = FastMMoEConfig.from_dict({k: v for k, v in best["config"].items() if k != "type"})
        ours, theirs = (session.evaluate("test", Method("schedule", "", share, (c,))) for c in (chosen, official))
        difference, error = paired_difference(answers_of(ours), answers_of(theirs))
        print(f"retention {share}: {chosen.prune_layers} {chosen.keep_ratios}")
        print(f"  test: {ours['accuracy']:.3f} at {ours['flops_ratio']:.3f} of the FLOPs")
        print(f"  official: {theirs['accuracy']:.3f} at {theirs['flops_ratio']:.3f}, {difference:+.4f} +- {error:.4f}")
        results.append(
            {
                "retention": share,
                "dev": rows,
                "test": {"chosen": ours, "official": theirs},
                "test_difference": {"mean": difference, "standard_error": error},
            }
        )
    write_json(
        {**provenance(torch.device("cpu")), "n": n, "dev_n": dev_n, "seed": seed, "results": results}, json_path
    )


if __name__ == "__main__":
    typer.run(main)
