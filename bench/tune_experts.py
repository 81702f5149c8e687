"""Find the expert GEMMs' tiles for the GPU at hand, and write them into the table that the package ships.

    python bench/tune_experts.py --json tiles.json            # print the row
    python bench/tune_experts.py --json tiles.json --write    # and put it into fastmmoe_kernels/experts/tiles.py

Starts from the table's row and changes one thing at a time (what must change together, together), twice. gate_up and
down are tuned apart, for every number of rows per tile; all candidates of a kernel run in turn, round after round, on
every shape. Worker processes compile, so that the processor's cores are the limit and not one. A candidate must give
the same result as the table's tiles, must not spill registers, and must be faster by more than noise. What one step
found is written before the next begins.
"""

import itertools
import os
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer
from launches import record_launches
from provenance import device_name, provenance, write_json
from rich.console import Console
from rich.table import Table
from roofline import ExpertsShape, padding_factor
from tile_table import Row, find_most_pairs, format_most_pairs, format_row, replace_row
from timing import Call, Key, interleave, prepare
from tqdm import tqdm
from workload import make_hidden, make_routing, make_weights, routing_logits

from fastmmoe_kernels.backend import resolve_backend
from fastmmoe_kernels.experts import kernel, tiles
from fastmmoe_kernels.experts.tiles import ExpertTiles, GemmTile, shared_memory
from fastmmoe_kernels.interpreter import mend_interpreter

SHAPES = {
    "A": ExpertsShape("A", 2048, 768, 128, (8,)),  # Qwen3-30B-A3B: InternVL3.5, Qwen3-VL
    "B": ExpertsShape("B", 2560, 1536, 72, (6,)),  # DeepSeek-VL2
    "tiny": ExpertsShape("tiny", 32, 32, 2, (2,)),
}
# rows per tile -> pairs per expert at which its tiles are tuned; the table uses it from the row above's end to its own
PAIRS_PER_EXPERT = {16: 8, 32: 20, 64: 48, 128: 512}
# where the choice of rows per tile could change
CROSSOVERS = (8, 12, 16, 24, 32, 48, 59, 64, 96, 118, 192, 256)
# weight tiles per program
OPERANDS = {"gate_up": 2, "down": 1}
# a thread has 255 registers; half of them for sums
MAX_ACCUMULATORS = 128
# what rounding may do to the result, and what is noise in a median
MAX_ERROR, MIN_GAIN = 1e-2, 0.01

Gemm = tuple[int, str]  # rows per tile, "gate_up" or "down"
console = Console()


@dataclass(frozen=True)
class Job:
    """One candidate on one shape."""

    shape: ExpertsShape
    block_m: int
    gemm: str
    tile: GemmTile

    def tiles(self, target: str, dtype: torch.dtype) -> ExpertTiles:
        """The candidate, with the table's tile for the other GEMM."""
        return replace(table_tiles(target, dtype, self.block_m, self.shape), **{self.gemm: self.tile})


@dataclass(frozen=True)
class Inputs:
    """Arguments of `moe_experts_triton`."""

    hidden: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def run(self, chosen: ExpertTiles) -> torch.Tensor:
        """The experts with these tiles instead of the table's."""
        with mock.patch.object(kernel, "expert_tiles", lambda *_: chosen):
            return kernel.moe_experts_triton(*vars(self).values())


def table_tiles(target: str, dtype: torch.dtype, block_m: int, shape: ExpertsShape) -> ExpertTiles:
    return tiles.tiles_of_rows(target, dtype, block_m, shape.hidden, shape.intermediate)


def dtype_of(device: torch.device) -> torch.dtype:
    """The interpreter computes nonsense in bfloat16; float16 has the same tiles."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def make_inputs(shape: ExpertsShape, tokens: int, device: torch.device) -> Inputs:
    dtype, top_k = dtype_of(device), shape.top_k[0]
    weights = make_weights(shape, dtype, device, 0)
    routing = make_routing(routing_logits("uniform", tokens, shape.experts, 1), top_k, dtype, device)
    hidden = make_hidden(shape, tokens, dtype, device, 2)
    return Inputs(hidden, weights.gate_up, weights.down, routing.ids, routing.weights)


def neighbours(tile: GemmTile) -> set[GemmTile]:
    """`tile` and those one step away. Tile and warps, and depth and stages, also change together."""

    def scaled(**factors: float) -> GemmTile:
        return replace(tile, **{name: int(getattr(tile, name) * factor) for name, factor in factors.items()})

    steps = {tile, replace(tile, num_stages=tile.num_stages + 1), replace(tile, num_stages=tile.num_stages - 1)}
    for up, down in ((2, 0.5), (0.5, 2)):
        steps |= {
            scaled(block_n=up), scaled(block_k=up), scaled(num_warps=up), scaled(group_m=up),
            scaled(block_n=up, num_warps=up), scaled(block_k=up, num_stages=down), scaled(block_n=up, block_k=down),
        }  # fmt: skip
    return steps


def is_sensible(tile: GemmTile, block_m: int, gemm: str, shapes: Iterable[ExpertsShape], target: str) -> bool:
    """Fits the device's shared memory and a thread's registers, and is no larger than any of the matrices."""
    limit = tiles.SHARED_MEMORY.get(target, tiles.DEFAULT_SHARED_MEMORY)
    sums = block_m * tile.block_n * OPERANDS[gemm] / (32 * tile.num_warps)
    columns = {"gate_up": "intermediate", "down": "hidden"}[gemm]
    return (
        shared_memory(tile, target, block_m, OPERANDS[gemm], itemsize=2) <= limit
        and sums <= MAX_ACCUMULATORS
        and 32 <= tile.block_n < 2 * max(32, min(getattr(shape, columns) for shape in shapes))
        and 32 <= tile.block_k <= 128
        and tile.num_warps in (4, 8)
        and 2 <= tile.num_stages <= 6
        and 1 <= tile.group_m <= 32
    )


def compile_job(job: Job, device: torch.device) -> str | None:
    """In a worker: run the candidate once on a few tokens, so that Triton's cache has it. Why not, if it fails."""
    torch.set_num_threads(1)
    if device.type == "cpu":
        mend_interpreter()  # in every process
    few = replace(job.shape, experts=job.shape.top_k[0])
    try:
        target, dtype = kernel.device_target(device), dtype_of(device)
        compiled = record_launches(lambda: make_inputs(few, 4, device).run(job.tiles(target, dtype)))
        # the interpreter returns nothing
        spills = getattr(compiled[f"{job.gemm}_kernel"](), "n_spills", 0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return f"spills {spills} registers" if spills else None
    except Exception as error:  # whatever the compiler or the device throws: this candidate is out
        return f"{type(error).__name__}: {error}"


class Tuner:
    """Times candidates; `records` keeps every timing, `failed` why a candidate was not timed."""

    def __init__(self, shapes: list[ExpertsShape], device: torch.device, rounds: int, workers: int) -> None:
        self.shapes, self.device, self.rounds, self.workers = shapes, device, rounds, workers
        self.target, self.dtype = kernel.device_target(device), dtype_of(device)
        self.records: list[dict] = []
        self.failed: dict[Job, str] = {}
        self.compiled: set[Job] = set()

    def compile(self, candidates: dict[Gemm, set[GemmTile]], start: dict[Gemm, GemmTile], deadline: float) -> None:
        """All candidates on all shapes, in parallel; those not ready at the deadline are out."""
        jobs = [
            job
            for (block_m, gemm), found in candidates.items()
            for shape, tile in itertools.product(self.shapes, sorted(found, key=str))
            if (job := Job(shape, block_m, gemm, tile)) not in self.compiled | self.failed.keys()
        ]
        # without what they must beat, the others count for nothing
        jobs.sort(key=lambda job: job.tile != start[job.block_m, job.gemm])
        with ProcessPoolExecutor(min(self.workers, max(1, len(jobs))), get_context("spawn")) as pool:
            running = {job: pool.submit(compile_job, job, self.device) for job in jobs}
            for job, future in tqdm(running.items(), desc="compile", unit="kernel"):
                try:
                    problem = future.result(timeout=max(0.0, deadline - time.monotonic()))
                except Exception as error:  # late, or the worker died
                    problem = f"{type(error).__name__}: {error}"
                if problem:
                    self.failed[job] = problem
                else:
                    self.compiled.add(job)
            pool.shutdown(wait=False, cancel_futures=True)

    def choose(self, block_m: int, gemm: str, candidates: set[GemmTile], start: GemmTile) -> GemmTile:
        """The fastest over all shapes; `start` unless it was timed and another is faster by more than noise."""
        jobs = {tile: [Job(shape, block_m, gemm, tile) for shape in self.shapes] for tile in candidates}
        seconds: dict[GemmTile, float] = dict.fromkeys(jobs, 1.0)
        for number, shape in enumerate(self.shapes):
            inputs = make_inputs(shape, self._tokens(shape, PAIRS_PER_EXPERT[block_m]), self.device)
            calls: dict[GemmTile, Call] = {}
            want = inputs.run(table_tiles(self.target, self.dtype, block_m, shape)).float()
            for tile, of_tile in jobs.items():
                if all(job in self.compiled for job in of_tile):
                    calls[tile] = self._launch(of_tile[number], inputs, want)
            medians = self._medians({tile: call for tile, call in calls.items() if call is not None})
            pairs = inputs.ids.numel()
            flops = 2.0 * OPERANDS[gemm] * shape.hidden * shape.intermediate * pairs
            for tile in list(seconds):
                if tile not in medians:
                    del seconds[tile]
                    continue
                # the product ranks as the geometric mean does: no shape outweighs another
                seconds[tile] *= medians[tile]
                self.records.append(
                    {"shape": shape.name, "pairs": pairs, "block_m": block_m, "gemm": gemm, **asdict(tile),
                     "us": medians[tile] * 1e6, "tflops": flops / medians[tile] / 1e12}
                )  # fmt: skip
        if start not in seconds:
            return start
        best = min(seconds, key=seconds.get)
        gain = (seconds[start] / seconds[best]) ** (1 / len(self.shapes)) - 1
        return best if gain > MIN_GAIN else start

    def crossover(self, row: Row, crossovers: Iterable[int]) -> list[dict]:
        """The experts with each number of rows per tile, at pairs per expert where the choice could change."""
        shape, records = self.shapes[0], []
        for pairs_per_expert in crossovers:
            inputs = make_inputs(shape, self._tokens(shape, pairs_per_expert), self.device)
            calls = {}
            for rows, (gate_up, down) in row.items():
                chosen = ExpertTiles(rows, gate_up, down)
                calls[rows], _ = prepare(lambda i=inputs, c=chosen: i.run(c), self.device)
            medians = self._medians(calls)
            counts = inputs.ids.flatten().bincount(minlength=shape.experts).tolist()
            for rows, seconds in medians.items():
                records.append({"shape": shape.name, "pairs_per_expert": pairs_per_expert, "block_m": rows,
                                "us": seconds * 1e6, "padding": padding_factor(counts, rows)})  # fmt: skip
        return records

    def _launch(self, job: Job, inputs: Inputs, want: torch.Tensor) -> Call | None:
        """The candidate's kernel alone, if the experts are right with it."""
        got = []
        launches = record_launches(lambda: got.append(inputs.run(job.tiles(self.target, self.dtype))))
        error = ((got[0].float() - want).norm() / want.norm()).item()
        # written so that NaN fails
        if not error < MAX_ERROR:
            self.failed[job] = f"wrong: off by {error:.1e}"
            return None
        return prepare(launches[f"{job.gemm}_kernel"], self.device)[0]

    def _medians(self, calls: dict[Key, Call]) -> dict[Key, float]:
        seconds = interleave(calls, self.rounds, self.device)
        return {key: statistics.median(values) for key, values in seconds.items()}

    @staticmethod
    def _tokens(shape: ExpertsShape, pairs_per_expert: float) -> int:
        return max(1, round(pairs_per_expert * shape.experts / shape.top_k[0]))


def print_report(result: dict, old: Row, new: Row) -> None:
    console = Console()
    table = Table(title=f"tiles for {result['target']}: block_n, block_k, warps, stages, group_m")
    for column in ("rows", "GEMM", "table", "us", "tuned", "us"):
        table.add_column(column, justify="right")
    for block_m, index in itertools.product(new, (0, 1)):
        gemm, cells = list(OPERANDS)[index], []
        for tile in (old[block_m][index], new[block_m][index]):
            same = {"block_m": block_m, "gemm": gemm, **asdict(tile)}.items()
            # the last timing of each shape
            times = {r["shape"]: r["us"] for r in result["timings"] if same <= r.items()}
            cells += [" ".join(map(str, asdict(tile).values())), " ".join(f"{us:.0f}" for us in times.values())]
        table.add_row(str(block_m), gemm, *cells)
    console.print(table)
    table = Table(title="experts by rows per tile, us")
    table.add_column("pairs/expert", justify="right")
    for block_m in new:
        table.add_column(str(block_m), justify="right")
    for pairs, records in itertools.groupby(result["crossover"], key=lambda r: r["pairs_per_expert"]):
        table.add_row(str(pairs), *(f"{r['us']:.0f}" for r in records))
    console.print(table)
    console.print(f"{len(result['failed'])} candidates failed; why is in the JSON")


@torch.inference_mode()
def main(
    device: Annotated[str, typer.Option(help="cuda; cpu, with TRITON_INTERPRET=1, only tries the script.")] = "cuda",
    shape: Annotated[list[str] | None, typer.Option(help=f"{', '.join(SHAPES)}; may be repeated.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Rows per tile to tune; may be repeated.")] = None,
    passes: Annotated[int, typer.Option(min=1, help="Steps away from the table's row.")] = 2,
    candidates: Annotated[int | None, typer.Option(min=1, help="At most so many per kernel and pass.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times each candidate runs; the median counts.")] = 15,
    budget: Annotated[float, typer.Option(help="Seconds; then nothing else is compiled, no other pass begins.")] = 90,
    workers: Annotated[int, typer.Option(min=1, help="Processes that compile.")] = min(16, os.cpu_count() or 1),
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all timings to this file.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Put the row into fastmmoe_kernels/experts/tiles.py.")] = False,
) -> None:
    """Tune the expert GEMMs' tiles for one GPU."""
    start = time.monotonic()
    where = torch.device(device)
    if write and where.type != "cuda":
        raise typer.BadParameter(f"--write: expected --device cuda, got {device}")
    if unknown := [name for name in shape or () if name not in SHAPES]:
        raise typer.BadParameter(f"--shape: expected {', '.join(SHAPES)}, got {unknown[0]!r}")
    if unknown := [number for number in rows or () if number not in PAIRS_PER_EXPERT]:
        raise typer.BadParameter(f"--rows: expected {', '.join(map(str, PAIRS_PER_EXPERT))}, got {unknown[0]}")
    resolve_backend("triton", torch.empty(0, device=where))
    if where.type == "cpu":
        mend_interpreter()
    shapes = [SHAPES[name] for name in shape or ("A", "B")]
    tuner = Tuner(shapes, where, rounds, workers)
    old: Row = {}
    # most rows first: if time runs out, it is not at the cost of long prefills
    for block_m in rows or sorted(PAIRS_PER_EXPERT, reverse=True):
        found = table_tiles(tuner.target, tuner.dtype, block_m, shapes[0])
        old[block_m] = (found.gate_up, found.down)
    chosen: dict[Gemm, GemmTile] = {
        (block_m, gemm): tile for block_m, pair in old.items() for gemm, tile in zip(OPERANDS, pair, strict=True)
    }
    origin = provenance(where)
    note = f"tuned on {device_name(where)}, triton {origin['versions']['triton']}, {origin['date']}"
    result = {"what": "tiles of the expert GEMMs", **origin, "target": tuner.target, "rounds": rounds, "crossover": []}
    for number in range(passes):
        # at least one
        if number and time.monotonic() > start + budget:
            break
        field = {}
        for (block_m, gemm), tile in chosen.items():
            near = [t for t in neighbours(tile) if is_sensible(t, block_m, gemm, shapes, tuner.target)]
            field[block_m, gemm] = {tile, *sorted(near, key=str)[:candidates]}
        tuner.compile(field, chosen, start + budget)
        for (block_m, gemm), found in tqdm(field.items(), desc="time", unit="kernel"):
            chosen[block_m, gemm] = tuner.choose(block_m, gemm, found, chosen[block_m, gemm])
        new: Row = {block_m: (chosen[block_m, "gate_up"], chosen[block_m, "down"]) for block_m in old}
        result |= {
            "seconds": time.monotonic() - start, "row": format_row(tuner.target, new, note).splitlines(),
            "timings": tuner.records,
            "failed": [asdict(job) | {"why": why} for job, why in tuner.failed.items()],
        }  # fmt: skip
        # what there is stays if there is no time for the rest
        write_json(result, json_path)
        if write:
            path = Path(tiles.__file__)
            # rows per tile that were not tuned stay
            row = tiles.TILES.get(tuner.target, tiles.TILES[tiles.DEFAULT_TARGET]) | new
            path.write_text(replace_row(path.read_text(), tuner.target, format_row(tuner.target, row, note)))
            print(f"written into {path.name}")

    result["crossover"] = tuner.crossover(new, CROSSOVERS if where.type == "cuda" else CROSSOVERS[:1])
    medians: dict[float, dict[int, float]] = {}
    for record in result["crossover"]:
        medians.setdefault(record["pairs_per_expert"], {})[record["block_m"]] = record["us"]
    # of some rows per tile alone nothing follows for the others
    if set(new) == set(PAIRS_PER_EXPERT):
        line = format_most_pairs(tuner.target, find_most_pairs(medians), note)
        result["most_pairs"] = line.strip()
        if write:
            path.write_text(replace_row(path.read_text(), tuner.target, line, "MOST_PAIRS"))
    write_json(result, json_path)
    print_report(result, old, new)
    print("\n".join(result["row"]))


if __name__ == "__main__":
    typer.run(main)
