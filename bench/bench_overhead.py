"""What the model layer adds: hooks and Python, per layer, in a prefill and in a decode step.

    python bench/bench_overhead.py --json overhead.json
    python bench/bench_overhead.py --device cuda --size 30b --json overhead.json

Measured on a model of 48 layers with next to no arithmetic, so that what is left is Python (on a GPU: and launches).
Stock and FastMMoE take turns, round after round; what FastMMoE adds is the median of the differences of each round.
Decoding, which must stay the stock path, is measured after a text-only prompt (FastMMoE enabled, but idle) and after a
pruned prefill. With --size, the same microseconds are also given as a share of that model's decode step.
"""

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from prefill_model import SIZES, Case, build_model, build_samples, join
from prefill_variants import Runner, available_attentions, build_variants
from provenance import provenance, write_json
from rich.console import Console
from rich.table import Table
from timing import take_turns
from tqdm import tqdm

THIN = "thin"
# a text-only prompt, and one of few enough vision tokens that the arithmetic does not show
PROMPTS = {"text only": Case((0,), text=32, tile_tokens=16), "image": Case((4,), text=32, tile_tokens=16)}
# what each prompt is run with; FastMMoE does nothing on a text-only one, whatever its settings
METHODS = {"text only": ("both",), "image": ("experts only", "prune only", "both")}
# the prompt whose decode step and prefill the overhead is compared with where --size asks for it, and its rounds
REFERENCE, REFERENCE_ROUNDS = Case((4,), text=100), 5


def find_overheads(samples: dict[tuple[str, str], list[dict[str, float]]], stock: str, layers: int) -> list[dict]:
    """Per prompt, method and phase: what it adds to stock.

    Args:
        samples: (prompt, variant) -> seconds of every round, `ttft` and `tpot`.
        stock: the variant that the others are compared with.
    """
    records = []
    for (prompt, method), runs in samples.items():
        base = samples[prompt, stock]
        for phase, kind in (("prefill", "ttft"), ("decode step", "tpot")) if method != stock else ():
            added = statistics.median(r[kind] - b[kind] for r, b in zip(runs, base, strict=True))
            whole = statistics.median(b[kind] for b in base)
            records.append({"phase": phase, "prompt": prompt, "method": method, "stock_us": whole * 1e6,
                            "added_us": added * 1e6, "added_us_per_layer": added * 1e6 / layers,
                            "share_of_stock": added / whole})  # fmt: skip
    return records


def measure_thin(device: torch.device, dtype: torch.dtype, rounds: int, steps: int) -> list[dict]:
    size = SIZES[THIN]
    runner = Runner(build_model(size, device, dtype, PROMPTS["image"].tile_tokens))
    variants = build_variants(size, 0.5, available_attentions()[:1], ["grouped_mm"])
    stock = next(iter(variants))
    inputs = {name: join(build_samples(runner.model, case)) for name, case in PROMPTS.items()}
    with tqdm(total=(rounds + 1) * sum(1 + len(methods) for methods in METHODS.values()), unit="run") as progress:

        def measure(prompt: str, method: str) -> dict[str, float]:
            seconds = runner.measure(variants[method], inputs[prompt], steps)
            progress.update()
            return seconds

        calls = {
            (prompt, method): lambda p=prompt, m=method: measure(p, m)
            for prompt, methods in METHODS.items()
            for method in (stock, *methods)
        }
        take_turns(calls, 1)  # warms up
        return find_overheads(take_turns(calls, rounds), stock, size.layers)


def measure_reference(name: str, device: torch.device, dtype: torch.dtype, steps: int) -> dict:
    """Medians of a stock model with real arithmetic."""
    runner = Runner(build_model(SIZES[name], device, dtype))
    stock, *_ = build_variants(SIZES[name], 0.5, available_attentions()[:1], ["grouped_mm"]).values()
    inputs = join(build_samples(runner.model, REFERENCE))
    runs = take_turns({name: lambda: runner.measure(stock, inputs, steps)}, REFERENCE_ROUNDS + 1)[name][1:]
    return {"size": name, **asdict(SIZES[name]), "prompt": str(REFERENCE), "rounds": REFERENCE_ROUNDS,
            "prefill_us": statistics.median(run["ttft"] for run in runs) * 1e6,
            "decode_step_us": statistics.median(run["tpot"] for run in runs) * 1e6}  # fmt: skip


def add_shares(records: list[dict], reference: dict) -> None:
    """What FastMMoE adds to each layer, of the reference's prefill or decode step."""
    whole = {"prefill": reference["prefill_us"], "decode step": reference["decode_step_us"]}
    for record in records:
        record["share_of_reference"] = record["added_us_per_layer"] * reference["layers"] / whole[record["phase"]]


def print_report(result: dict) -> None:
    size = result["reference"]["size"] if result["reference"] else None
    table = Table(title=f"added by FastMMoE, {result['model']['layers']} layers, {result['rounds']} rounds")
    columns = ["phase", "prompt", "method", "stock, us", "added, us", "per layer, us", "of stock"]
    for column in columns + [f"of {size}'s"] * (size is not None):
        table.add_column(column, justify="left" if column in columns[:3] else "right", no_wrap=True)
    for record in result["overheads"]:
        cells = [record["phase"], record["prompt"], record["method"], f"{record['stock_us']:.0f}",
                 f"{record['added_us']:.0f}", f"{record['added_us_per_layer']:.1f}",
                 f"{record['share_of_stock']:.2%}"]  # fmt: skip
        table.add_row(*cells, *([f"{record['share_of_reference']:.2%}"] if size else []))
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


@torch.inference_mode()
def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    size: Annotated[
        Literal["tiny", "small", "30b"] | None, typer.Option(help="Also as a share of this model's times.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times each variant runs; medians count.")] = 30,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps after each prefill.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Measure what hooks and Python add to a prefill and to a decode step."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    records = measure_thin(where, dtype, rounds, steps)
    result = {
        "what": "what FastMMoE's hooks and Python add", **provenance(where), "device": where.type,
        "dtype": str(dtype).removeprefix("torch."), "model": {"size": THIN, **asdict(SIZES[THIN])},
        "prompts": {name: str(case) for name, case in PROMPTS.items()}, "rounds": rounds, "decode_steps": steps,
        "reference": None, "overheads": records,
    }  # fmt: skip
    # stays if the reference fails
    write_json(result, json_path)
    if size is not None:
        result["reference"] = measure_reference(size, where, dtype, steps)
        add_shares(records, result["reference"])
        write_json(result, json_path)
    print_report(result)


if __name__ == "__main__":
    typer.run(main)
