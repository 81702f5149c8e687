"""Prefill time of a small InternVL with FastMMoE off and on, side by side in one run.

    python bench/bench_prefill.py --json bench/results/cpu/prefill.json

All variants run in turn, round after round, so that a slow moment of the machine meets all of them. Before anything
is timed, the variants' greedy tokens are checked to be what the stock model gives when nothing is reduced.
"""

import itertools
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen3MoeConfig

import fastmmoe
from fastmmoe import FastMMoEConfig

IMAGE_TOKEN = 1
TOKENS_PER_TILE = 256


def build_model(hidden: int, layers: int, experts: int, top_k: int, seed: int) -> InternVLForConditionalGeneration:
    """A compute-bound language model in the proportions of InternVL3.5-30B-A3B, behind a vision tower of no weight."""
    torch.manual_seed(seed)
    vision = InternVLVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=448, patch_size=14
    )
    text = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 512), head_dim=64, num_experts=experts, num_experts_per_tok=top_k,
        moe_intermediate_size=hidden * 3 // 8, intermediate_size=hidden * 3, norm_topk_prob=True,
    )  # fmt: skip
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    return InternVLForConditionalGeneration(config).eval()


def build_inputs(model: InternVLForConditionalGeneration, tiles: int, text: int, batch: int) -> dict[str, torch.Tensor]:
    """`tiles` image tiles of 256 tokens between the first and the second half of `text` random words, per sample."""
    words = torch.randint(2, 1024, (batch, text))
    image = torch.full((batch, tiles * TOKENS_PER_TILE), IMAGE_TOKEN)
    ids = torch.cat((words[:, : text // 2], image, words[:, text // 2 :]), 1)
    pixels = torch.randn(batch * tiles, 3, 448, 448)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def variants(top_k: int, layers: int, retention: float) -> dict[str, FastMMoEConfig | None]:
    """Stock transformers, and FastMMoE with each half of the method and both; the official scripts' layers, scaled."""
    prune_layers = tuple(sorted({max(1, round(layers * share)) for share in (5 / 48, 8 / 48, 12 / 48)}))
    half = {"vision_top_k": max(1, top_k // 2), "reduction_layer": 2}
    prune = {"prune_layers": prune_layers, "retention": retention}
    return {
        "stock": None,
        "experts only": FastMMoEConfig(**half),
        "prune only": FastMMoEConfig(**prune),
        "both": FastMMoEConfig(**half, **prune),
    }


def prefill_seconds(model: InternVLForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> float:
    start = time.perf_counter()
    model(**inputs, logits_to_keep=1)
    return time.perf_counter() - start


def check_unchanged(model: InternVLForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> None:
    """No time is reported for a model that FastMMoE would break: settings that reduce nothing must change nothing."""
    want = model(**inputs, logits_to_keep=1).logits
    with fastmmoe.enabled(model, FastMMoEConfig()):
        if not torch.equal(model(**inputs, logits_to_keep=1).logits, want):
            raise SystemExit("parity: enabled with settings that change nothing, the logits differ from stock")
    # K_v = K leaves the stock experts in place, so the experts kernel is put in by itself
    language_model = model.model.language_model
    stock = language_model.config._experts_implementation
    language_model.set_experts_implementation("fastmmoe")
    got = model(**inputs, logits_to_keep=1).logits
    language_model.set_experts_implementation(stock)
    error = ((got - want).norm() / want.norm()).item()
    if not error < 1e-3:
        raise SystemExit(f"parity: the experts kernel's logits differ from stock by {error:.1e}, expected < 1e-3")


@torch.inference_mode()
def main(
    hidden: Annotated[int, typer.Option(help="Hidden size of the language model.")] = 1024,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 16,
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 32,
    top_k: Annotated[int, typer.Option(help="Experts per token; vision tokens take half.")] = 8,
    tiles: Annotated[int, typer.Option(help="Image tiles per sample, 256 vision tokens each.")] = 4,
    text: Annotated[int, typer.Option(help="Text tokens per sample.")] = 64,
    batch: Annotated[int, typer.Option(help="Samples.")] = 1,
    retention: Annotated[float, typer.Option(help="Overall share of vision tokens kept.")] = 0.5,
    rounds: Annotated[int, typer.Option(help="Times each variant runs; the median counts.")] = 7,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: int = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Compare prefill times; print time and FLOPs saved and how much of the one the other explains."""
    torch.set_num_threads(threads)
    model = build_model(hidden, layers, experts, top_k, seed)
    inputs = build_inputs(model, tiles, text, batch)
    configs = variants(top_k, layers, retention)
    check_unchanged(model, inputs)

    times: dict[str, list[float]] = {name: [] for name in configs}
    saved_flops = {"stock": 0.0}
    progress = tqdm(list(itertools.product(range(rounds + 1), configs)), desc="prefill", unit="run")
    for round_number, name in progress:
        config = configs[name]
        if config is None:
            seconds = prefill_seconds(model, inputs)
        else:
            with fastmmoe.enabled(model, config):
                seconds = prefill_seconds(model, inputs)
                saved_flops[name] = fastmmoe.report(model).flops.saved
        if round_number:  # the first round warms up
            times[name].append(seconds)

    stock = statistics.median(times["stock"])
    rows = []
    for name, measured in times.items():
        # ratios of neighbouring runs: what the machine did in that round cancels
        ratio = statistics.median(t / s for t, s in zip(measured, times["stock"], strict=True))
        saved = saved_flops[name]
        rows.append(
            {
                "variant": name,
                "seconds": statistics.median(measured),
                "time_ratio": ratio,
                "flops_ratio": 1.0 - saved,
                "time_saved_per_flops_saved": (1.0 - ratio) / saved if saved else None,
            }
        )
    result = {
        "what": "prefill of a random InternVL with a Qwen3-MoE text model, fp32",
        "date": date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "threads": threads, "python": platform.python_version()},
        "versions": {
            "fastmmoe": fastmmoe.__version__, "torch": torch.__version__, "transformers": transformers.__version__
        },
        "model": {"hidden": hidden, "layers": layers, "experts": experts, "top_k": top_k,
                  "experts_implementation": model.config.text_config._experts_implementation},
        "tokens": {"vision": tiles * TOKENS_PER_TILE, "text": text, "batch": batch},
        "settings": {name: config.to_dict() for name, config in configs.items() if config is not None},
        "rounds": rounds,
        "stock_seconds": stock,
        "variants": rows,
    }  # fmt: skip
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=2) + "\n")

    table = Table(title=f"prefill, {tiles * TOKENS_PER_TILE} vision + {text} text tokens x {batch}, {cpu_name()}")
    for column in ("variant", "seconds", "time / stock", "FLOPs / stock", "time saved per FLOPs saved"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        share = row["time_saved_per_flops_saved"]
        table.add_row(
            row["variant"], f"{row['seconds']:.2f}", f"{row['time_ratio']:.3f}", f"{row['flops_ratio']:.3f}",
            "" if share is None else f"{share:.2f}",
        )  # fmt: skip
    Console().print(table)


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    typer.run(main)
