"""Prefill (TTFT) and decoding (TPOT) of InternVL, dense in every available form and with FastMMoE, in one run.

    python bench/bench_prefill.py --json bench/results/cpu/prefill.json
    python bench/bench_prefill.py --device cuda --size 30b --text 100 --tiles 7 --tiles 25 --batch 1 --batch 8 --mixed 8

Cases are all --tiles with all --batch. In each, the variants take turns, round after round, so that a slow moment of
the machine meets all of them alike; ratios are to stock transformers, and to the fastest of the dense variants in the
same case. Beside the time: the floor that `fastmmoe.prefill_time` calculates at ceilings of this device (measured
first), FLOPs, the prefill's peak memory and what it leaves (the cache, mostly), and from how many vision tokens on
FastMMoE pays. Nothing is timed before the parity check is green.
"""

import itertools
import time
from dataclasses import asdict
from math import isqrt
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from prefill_model import SIZES, Case, build_model, build_samples, join
from prefill_summary import add_model, find_break_evens, median_errors, summarise
from prefill_variants import (
    Runner,
    Variant,
    available_attentions,
    build_variants,
    check_parity,
    default_experts,
    skipping_variants,
)
from provenance import provenance, write_json
from report_prefill import print_report
from timing import take_turns
from tqdm import tqdm

from fastmmoe import FastMMoEConfig, prefill_time
from fastmmoe.cost.devices import Ceilings, measure_ceilings


def list_cases(tiles: list[int], batch: list[int], mixed: int, text: int, tile_tokens: int) -> list[Case]:
    """All tiles with all batch sizes, then the mixed batch: one sample of 1 tile, one of 2, ... one of `mixed`."""
    cases = [Case((count,) * size, text, tile_tokens) for count, size in itertools.product(tiles, batch)]
    if mixed:
        cases.append(Case(tuple(range(1, mixed + 1)), text, tile_tokens))
    return cases


def run_case(
    runner: Runner,
    variants: dict[str, Variant],
    case: Case,
    ceilings: Ceilings,
    rounds: int,
    steps: int,
    deadline: float,
) -> dict:
    """Everything about one case."""
    samples = build_samples(runner.model, case)
    inputs = join(samples)
    known, pairs = {}, {}
    with tqdm(total=(rounds + 1) * len(variants), desc=str(case), unit="run") as progress:
        for name, variant in variants.items():
            memory, report = runner.inspect(variant, inputs)
            known[name] = {
                "method": variant.method, "attention": variant.attention, "experts": variant.experts,
                "flops_saved": report.flops.saved if report else 0.0,
                "experts_skipped": report.experts_skipped if report else 0.0,
                "peak_bytes": memory.peak, "left_bytes": memory.left,
            }  # fmt: skip
            pairs[name] = report.expert_pairs if report else {}
            progress.update()

        def measure(variant: Variant) -> dict[str, float]:
            seconds = runner.measure(variant, inputs, steps)
            if case.is_mixed:
                seconds["one_by_one"] = runner.measure_one_by_one(variant, samples)
            progress.update()
            return seconds

        calls = {name: lambda v=variant: measure(v) for name, variant in variants.items()}
        measured = take_turns(calls, rounds, deadline)
    result = {
        "label": str(case), "batch": case.batch, "vision_tokens": list(case.vision_tokens), "text_tokens": case.text,
        "is_mixed": case.is_mixed, "padded_share": case.padded_share, "rounds": len(next(iter(measured.values()))),
        **summarise(measured, known), "samples": measured,
    }  # fmt: skip
    text = [case.text] * case.batch
    calculated = {
        name: prefill_time(
            runner.model, text, case.vision_tokens, variant.config or FastMMoEConfig(), ceilings,
            expert_pairs=pairs[name],
        ).reduced
        for name, variant in variants.items()
    }
    add_model(result, calculated)
    return result


@torch.inference_mode()
def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    size: Annotated[Literal["tiny", "thin", "small", "30b"], typer.Option(help="Language model.")] = "small",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of the weights.")] = None,
    attention: Annotated[list[str] | None, typer.Option(help="Of transformers; repeat; all that are there.")] = None,
    experts: Annotated[list[str] | None, typer.Option(help="Dense peers; repeat; grouped_mm, on a CPU eager.")] = None,
    tiles: Annotated[list[int] | None, typer.Option(min=1, help="Image tiles per sample; repeat; 4.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Samples; repeat; 1.")] = None,
    mixed: Annotated[int, typer.Option(min=0, help="Also a padded batch of N samples with 1 to N tiles.")] = 0,
    tile_tokens: Annotated[int, typer.Option(help="Vision tokens per tile, a square number.")] = 256,
    text: Annotated[int, typer.Option(min=2, help="Text tokens per sample.")] = 64,
    retention: Annotated[float, typer.Option(help="Overall share of vision tokens kept.")] = 0.5,
    skip: Annotated[list[float] | None, typer.Option(help="Shares of the experts to skip by need; repeat.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times each variant runs; medians count.")] = 7,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps after each prefill.")] = 4,
    budget: Annotated[float, typer.Option(help="Seconds; then no other round or case begins.")] = float("inf"),
    threads: Annotated[int, typer.Option(help="CPU threads; several of them suffer from any other load.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Compare prefill and decoding times, FLOPs and memory, over numbers of vision tokens and of samples."""
    deadline = time.monotonic() + budget
    if tile_tokens < 1 or isqrt(tile_tokens) ** 2 != tile_tokens:
        raise typer.BadParameter(f"--tile-tokens: expected a square number, got {tile_tokens}")
    if mixed == 1:
        raise typer.BadParameter("--mixed: expected 0 or at least 2 samples, got 1")
    torch.set_num_threads(threads)
    where = torch.device(device)
    dtype = dtype or ("float32" if where.type == "cpu" else "bfloat16")
    attention, experts = attention or available_attentions(), experts or default_experts(where)
    cases = list_cases(tiles or [4], batch or [1], mixed, text, tile_tokens)
    variants = build_variants(SIZES[size], retention, attention, experts)

    runner = Runner(build_model(SIZES[size], where, getattr(torch, dtype), tile_tokens))
    # of the grid's shortest prompts, one is enough
    shortest = Case((min(min(case.tiles) for case in cases),), text, tile_tokens)
    inputs = join(build_samples(runner.model, shortest))
    parity = check_parity(runner, inputs, attention[0], experts[0])
    for share in skip or []:
        variants |= skipping_variants(runner, inputs, share, attention, experts[0])
    ceilings = measure_ceilings(where, getattr(torch, dtype))
    result = {
        "what": "prefill and decode of a random InternVL with a Qwen3-MoE language model", **provenance(where),
        "model": {"size": size, **asdict(SIZES[size]), "dtype": dtype}, "device": where.type,
        "settings": {name: v.config.to_dict() for name, v in variants.items() if v.config is not None},
        "decode_steps": steps, "parity": parity, "ceilings": asdict(ceilings), "model_errors": None,
        "cases": [], "break_even": [], "left_out": [],
    }  # fmt: skip
    for case in cases:
        # at least one
        if result["cases"] and time.monotonic() > deadline:
            result["left_out"].append(str(case))
            continue
        result["cases"].append(run_case(runner, variants, case, ceilings, rounds, steps, deadline))
        result["break_even"] = find_break_evens(result["cases"])
        result["model_errors"] = median_errors(result["cases"])
        # what there is stays if a later case fails
        write_json(result, json_path)
    write_json(result, json_path)
    print_report(result)


if __name__ == "__main__":
    typer.run(main)
