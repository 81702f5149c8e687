"""Prefill and decoding time of InternVL with FastMMoE off and on, side by side in one run.

    python bench/bench_prefill.py --json bench/results/cpu/prefill.json
    python bench/bench_prefill.py --device cuda --size 30b --tiles 7 --text 100 --json prefill.json

The variants take turns, round after round, so that a slow moment of the machine meets all of them alike. Nothing is
timed before the parity check is green.
"""

import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import (
    DynamicCache,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen3MoeConfig,
)

import fastmmoe
from fastmmoe import FastMMoEConfig

IMAGE_TOKEN = 1
TOKENS_PER_TILE = 256


@dataclass(frozen=True)
class Size:
    """A language model's dimensions."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    intermediate: int


SIZES = {
    "tiny": Size(64, 8, 4, 2, 16, 8, 4, 32),  # to try the script
    "small": Size(1024, 16, 16, 2, 64, 32, 8, 384),  # compute-bound on a CPU, in the proportions of 30b
    "30b": Size(2048, 48, 32, 4, 128, 128, 8, 768),  # InternVL3.5-30B-A3B
}


@dataclass(frozen=True)
class Variant:
    """One way to run the model: whose experts run where nothing is reduced, and what FastMMoE reduces."""

    experts: str | None = None  # None: what transformers chose
    config: FastMMoEConfig | None = None


def build_model(size: Size, device: str, dtype: torch.dtype, attention: str) -> InternVLForConditionalGeneration:
    """Random weights behind a vision tower of no weight: the language model is what is measured."""
    vision = InternVLVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=448, patch_size=14
    )
    text = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=size.hidden, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, head_dim=size.head_dim, num_experts=size.experts,
        num_experts_per_tok=size.top_k, moe_intermediate_size=size.intermediate, intermediate_size=3 * size.hidden,
        norm_topk_prob=True,
    )  # fmt: skip
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    torch.manual_seed(0)
    with torch.device(device):
        model = InternVLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()


def build_inputs(model: InternVLForConditionalGeneration, tiles: int, text: int, batch: int) -> dict[str, torch.Tensor]:
    """`tiles` image tiles of 256 tokens between the first and the second half of `text` random words, per sample."""
    words = torch.randint(2, 1024, (batch, text))
    image = torch.full((batch, tiles * TOKENS_PER_TILE), IMAGE_TOKEN)
    ids = torch.cat((words[:, : text // 2], image, words[:, text // 2 :]), 1).to(model.device)
    pixels = torch.randn(batch * tiles, 3, 448, 448).to(model.device, model.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def build_variants(size: Size, retention: float) -> dict[str, Variant]:
    """Stock transformers; the same with our experts; FastMMoE with each half of the method, and with both.

    The prune layers are those of the official scripts, scaled to the model's depth.
    """
    layers = tuple(sorted({max(1, round(size.layers * layer / 48)) for layer in (5, 8, 12)}))
    fewer = {"vision_top_k": max(1, size.top_k // 2), "reduction_layer": 2}
    prune = {"prune_layers": layers, "retention": retention}
    return {
        "stock": Variant(),
        "stock, our experts": Variant("fastmmoe"),
        "experts only": Variant(config=FastMMoEConfig(**fewer)),
        "prune only": Variant(config=FastMMoEConfig(**prune)),
        "both": Variant(config=FastMMoEConfig(**fewer, **prune)),
    }


class Runner:
    """Runs variants on one model and one batch."""

    def __init__(self, model: InternVLForConditionalGeneration, inputs: dict[str, torch.Tensor]):
        self.model, self.inputs = model, inputs
        self._language_model = model.model.language_model
        self.stock_experts = self._language_model.config._experts_implementation

    def _wait(self) -> None:
        if self.model.device.type != "cpu":
            torch.accelerator.synchronize(self.model.device)

    def run(self, variant: Variant, steps: int) -> dict[str, float]:
        """Seconds of one prefill and of one decode step after it, and the share of FLOPs saved."""
        self._language_model.set_experts_implementation(variant.experts or self.stock_experts)
        if variant.config is not None:
            fastmmoe.enable(self.model, variant.config)
        try:
            cache = DynamicCache(config=self._language_model.config)
            self._wait()
            start = time.perf_counter()
            logits = self.model(**self.inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            self._wait()
            prefill = time.perf_counter() - start
            token = logits[:, -1].argmax(-1, keepdim=True)
            start = time.perf_counter()
            for _ in range(steps):
                logits = self.model(input_ids=token, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1].argmax(-1, keepdim=True)
            self._wait()
            decode = (time.perf_counter() - start) / steps
            saved = fastmmoe.report(self.model).flops.saved if variant.config is not None else 0.0
        finally:
            fastmmoe.disable(self.model)
            self._language_model.set_experts_implementation(self.stock_experts)
        return {"prefill": prefill, "decode": decode, "saved": saved}

    def logits(self, variant: Variant) -> torch.Tensor:
        """The first token's logits, float32 [B, vocabulary]."""
        self._language_model.set_experts_implementation(variant.experts or self.stock_experts)
        try:
            if variant.config is None:
                return self.model(**self.inputs, logits_to_keep=1).logits[:, -1].float()
            with fastmmoe.enabled(self.model, variant.config):
                return self.model(**self.inputs, logits_to_keep=1).logits[:, -1].float()
        finally:
            self._language_model.set_experts_implementation(self.stock_experts)


def check_parity(runner: Runner) -> dict[str, float]:
    """Nothing is timed on a model that FastMMoE would break.

    Raises:
        SystemExit: settings that reduce nothing change a bit, or our experts' logits are not those of the stock ones.
    """
    stock = runner.logits(Variant())
    if not torch.equal(runner.logits(Variant(config=FastMMoEConfig())), stock):
        raise SystemExit("parity: with settings that reduce nothing, the logits differ from stock")
    error = ((runner.logits(Variant("fastmmoe")) - stock).norm() / stock.norm()).item()
    bound = 1e-4 if runner.model.dtype == torch.float32 else 5e-2
    if not error <= bound:
        raise SystemExit(f"parity: with our experts the logits differ from stock by {error:.1e}, expected <= {bound}")
    return {"relative_error_of_logits": error, "bound": bound}


def summarise(samples: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Medians, and ratios to stock taken within each round: what the machine did in that round cancels."""
    rows = []
    for name, runs in samples.items():
        ratio = {
            kind: statistics.median(r[kind] / s[kind] for r, s in zip(runs, samples["stock"], strict=True))
            for kind in ("prefill", "decode")
        }
        saved = runs[0]["saved"]
        rows.append(
            {
                "variant": name,
                "prefill_seconds": statistics.median(r["prefill"] for r in runs),
                "decode_seconds_per_token": statistics.median(r["decode"] for r in runs),
                "prefill_ratio": ratio["prefill"],
                "decode_ratio": ratio["decode"],
                "flops_ratio": 1.0 - saved,
                "time_saved_per_flops_saved": (1.0 - ratio["prefill"]) / saved if saved else None,
            }
        )
    return rows


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Print the figures as a table."""
    table = Table(title=title)
    columns = ("variant", "prefill s", "prefill / stock", "FLOPs / stock", "time saved / FLOPs saved", "decode / stock")
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        share = row["time_saved_per_flops_saved"]
        table.add_row(
            row["variant"],
            f"{row['prefill_seconds']:.3f}",
            f"{row['prefill_ratio']:.3f}",
            f"{row['flops_ratio']:.3f}",
            "" if share is None else f"{share:.2f}",
            f"{row['decode_ratio']:.3f}",
        )
    Console().print(table)


def machine(device: str) -> dict[str, Any]:
    """What the figures were taken on."""
    if device != "cpu":
        return {"device": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "device": names[0].split(":", 1)[1].strip() if names else platform.processor(),
        "threads": torch.get_num_threads(),
    }


@torch.inference_mode()
def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    size: Annotated[Literal["tiny", "small", "30b"], typer.Option(help="Language model.")] = "small",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of the weights.")] = None,
    attention: Annotated[str, typer.Option(help="Attention implementation of transformers.")] = "sdpa",
    tiles: Annotated[int, typer.Option(help="Image tiles per sample, 256 vision tokens each.")] = 4,
    text: Annotated[int, typer.Option(help="Text tokens per sample.")] = 64,
    batch: Annotated[int, typer.Option(help="Samples.")] = 1,
    retention: Annotated[float, typer.Option(help="Overall share of vision tokens kept.")] = 0.5,
    rounds: Annotated[int, typer.Option(help="Times each variant runs; medians count.")] = 7,
    steps: Annotated[int, typer.Option(help="Decode steps after each prefill.")] = 4,
    threads: Annotated[int, typer.Option(help="CPU threads; several of them suffer from any other load.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Compare prefill and decoding times; print time and FLOPs ratios side by side."""
    torch.set_num_threads(threads)
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    model = build_model(SIZES[size], device, getattr(torch, dtype), attention)
    runner = Runner(model, build_inputs(model, tiles, text, batch))
    variants = build_variants(SIZES[size], retention)
    parity = check_parity(runner)

    samples: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    with tqdm(total=(rounds + 1) * len(variants), desc="prefill", unit="run") as progress:
        for round_number in range(rounds + 1):
            for name, variant in variants.items():
                measured = runner.run(variant, steps)
                if round_number:  # the first round warms up
                    samples[name].append(measured)
                progress.update()

    rows = summarise(samples)
    result = {
        "what": "prefill and decode of a random InternVL with a Qwen3-MoE language model",
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "machine": machine(device),
        "versions": {
            "python": platform.python_version(),
            "fastmmoe": fastmmoe.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": {**asdict(SIZES[size]), "dtype": dtype, "attention": attention, "experts": runner.stock_experts},
        "tokens_per_sample": {"vision": tiles * TOKENS_PER_TILE, "text": text},
        "batch": batch,
        "settings": {name: v.config.to_dict() for name, v in variants.items() if v.config is not None},
        "rounds": rounds,
        "parity": parity,
        "variants": rows,
        "samples": samples,
    }
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    show(
        rows, f"{size}, {tiles * TOKENS_PER_TILE} vision + {text} text tokens x {batch}, {result['machine']['device']}"
    )


if __name__ == "__main__":
    typer.run(main)
