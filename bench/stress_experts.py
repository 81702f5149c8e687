"""Run the experts many times beside other traffic: are the results the same bits each time, and right?

    python bench/stress_experts.py --json stress.json

A GEMM whose asynchronous copies and matrix products are not ordered as they must be is right most of the time. Here a
second stream copies memory meanwhile, so that the order of things varies. With both of the largest row tiles, and
prompts of one image and of many.
"""

import itertools
from pathlib import Path
from typing import Annotated

import torch
import typer
from bench_experts import DTYPES, SHAPES
from contestants import our_experts
from provenance import provenance, write_json
from tqdm import tqdm
from workload import ERROR_BOUND, make_hidden, make_routing, make_weights, reference, routing_logits, worst_row_error

from fastmmoe_kernels.backend import resolve_backend
from fastmmoe_kernels.experts import kernel, tiles

ROWS = (64, 128)
COPY_BYTES = {"cuda": 2**28, "cpu": 2**20}


def run_beside_copies(run, times: int, device: torch.device) -> int:
    """How many of so many results differ in a bit from the first."""
    first = run()
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    # counted on the device: to wait for each result would put them in order
    differing = torch.zeros((), dtype=torch.int64, device=device)
    for number in tqdm(range(times), unit="run"):
        if stream is not None and number % 4 == 0:
            with torch.cuda.stream(stream):
                target.copy_(source)
        differing += (run().view(torch.uint8) != first.view(torch.uint8)).any()
    return int(differing)


@torch.inference_mode()
def main(
    device: Annotated[str, typer.Option(help="cuda; cpu, with TRITON_INTERPRET=1, only tries the script.")] = "cuda",
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "A",
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated; 1892 and 8192.")] = None,
    times: Annotated[int, typer.Option(min=1, help="Runs of each case.")] = 200,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write what was found to this file.")] = None,
) -> None:
    """Exit status 1 if a result is wrong, or not the same each time."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"--shape: expected {', '.join(SHAPES)}, got {shape!r}")
    if device not in COPY_BYTES:
        raise typer.BadParameter(f"--device: expected {', '.join(COPY_BYTES)}, got {device!r}")
    where, sizes = torch.device(device), SHAPES[shape]
    dtype, target = DTYPES[where.type], kernel.device_target(where)
    weights = make_weights(sizes, dtype, where, seed=0)
    backend = resolve_backend("triton", weights.down)
    result = {"what": "experts, again and again beside copies", **provenance(where), "times": times, "cases": []}
    for count, rows in itertools.product(tokens or (1892, 8192), ROWS):
        hidden = make_hidden(sizes, count, dtype, where, seed=1)
        routing = make_routing(routing_logits("skewed", count, sizes.experts, seed=2), sizes.top_k[0], dtype, where)
        ours, known = our_experts(weights, backend), dict(tiles.MOST_PAIRS)
        # so many rows per tile, whatever the number of pairs
        most = {tile: float("inf") if tile == rows else 0 for tile in tiles.DEFAULT_MOST_PAIRS}
        tiles.MOST_PAIRS[target] = most
        try:
            if tiles.expert_tiles(target, dtype, 1.0, sizes.hidden, sizes.intermediate).block_m != rows:
                print(f"skipped: {target} has no tile of {rows} rows in {dtype}")
                continue
            error = worst_row_error(ours(hidden, routing), reference(hidden, weights, routing))
            differing = run_beside_copies(lambda h=hidden, r=routing, o=ours: o(h, r), times, where)
        finally:
            tiles.MOST_PAIRS.clear()
            tiles.MOST_PAIRS.update(known)
        # written so that NaN is wrong
        ok = differing == 0 and error <= ERROR_BOUND[dtype]
        case = {"tokens": count, "rows_per_tile": rows, "differing": differing, "error": error, "ok": ok}
        result["cases"].append(case)
        print(case)
        write_json(result, json_path)
    if not all(case["ok"] for case in result["cases"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
