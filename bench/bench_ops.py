"""Time of every op by itself: FastMMoE's, stock PyTorch code in its place, and the method's definition in loops.

    python bench/bench_ops.py --json ops.json --plot ops.png      # on the GPU, if there is one
    python bench/bench_ops.py --op gate --op attention --tokens 4096

Every output is first compared with float64; who fails gets no speedup, and if it is FastMMoE, nobody does. Contestants
run in turn, round after round; the medians count. On a CPU FastMMoE is its PyTorch backend. Under Triton's interpreter
(`TRITON_INTERPRET=1`, `--device cpu --backend triton`), which tries the script, times say nothing and there are no
speedups.
"""

import itertools
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from ceilings import DTYPES, measure_ceilings
from contestants import OURS
from op_cases import OPS, Contestant, OpCase, Setting
from op_costs import FORMULAS, OpShape
from plot_ops import draw
from provenance import provenance, write_json
from report_ops import print_report
from roofline import Ceilings, roofline_seconds
from timing import Call, interleave, prepare
from tqdm import tqdm

from fastmmoe_kernels.backend import BACKENDS, resolve_backend

SHAPES = {
    shape.name: shape
    for shape in (
        OpShape("30b", 2048, 768, 128, 8, 4, 32, 4, 128),  # Qwen3-30B-A3B: InternVL3.5, Qwen3-VL
        OpShape("small", 512, 256, 64, 8, 4, 16, 2, 64),
        OpShape("tiny", 32, 16, 4, 2, 1, 2, 1, 16),
    )
}
# shape, (tokens, batch) and rounds where none are given
DEFAULTS = {
    "cuda": ("30b", ((1892, 1), (8192, 1), (1892, 8), (3600, 1)), 10),
    "cpu": ("small", ((512, 1), (2048, 1), (512, 4)), 15),
}
SUFFIXES = (".png", ".svg", ".pdf")
LEAST_TOKENS = 16  # with vision tokens enough to prune


def parse_ops(names: list[str]) -> list[str]:
    for name in names:
        if name not in (*OPS, "all"):
            raise typer.BadParameter(f"--op: expected one of {', '.join(OPS)}, all, got {name!r}")
    return list(OPS) if "all" in names else list(dict.fromkeys(names))


def check_numbers(name: str, numbers: list[float], low: int) -> None:
    for number in numbers:
        if number < low:
            raise typer.BadParameter(f"--{name}: expected {low} or more, got {number}")


def check_choice(name: str, value: str, expected: tuple[str, ...]) -> None:
    if value not in expected:
        raise typer.BadParameter(f"--{name}: expected one of {', '.join(expected)}, got {value!r}")


def check_files(json_path: Path | None, plot: Path | None) -> None:
    """That they can be written, before there is anything to lose."""
    if plot is not None and plot.suffix not in SUFFIXES:
        raise typer.BadParameter(f"--plot: expected a file that ends in {', '.join(SUFFIXES)}, got {plot}")
    for option, path in (("plot", plot), ("json", json_path)):
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("a").close()
        except OSError as error:
            raise typer.BadParameter(f"--{option}: {path}: {error.strerror}") from None


def parse_device(name: str, backend: str) -> tuple[torch.device, str]:
    """The device, and which backend "auto" is there."""
    check_choice("backend", backend, BACKENDS)
    has_gpu = torch.cuda.is_available()
    check_choice("device", name or "cpu", ("cuda", "cpu") if has_gpu else ("cpu",))
    device = torch.device(name or ("cuda" if has_gpu else "cpu"))
    try:
        return device, resolve_backend(backend, torch.empty(0, device=device))
    except RuntimeError as reason:
        raise typer.BadParameter(f"--backend: {reason}") from None


def run_case(name: str, at: Setting, ceilings: Ceilings, rounds: int) -> tuple[dict, dict[str, str]]:
    """One op at one size; and why peers did not take part."""
    case = OPS[name].build(at)
    record = {"op": name, "shape": at.shape.name, "tokens": at.tokens, "batch": at.batch, "vision_tokens": at.vision,
              "flops": sum(stage.flops for stage in case.stages), "bytes": sum(stage.bytes for stage in case.stages),
              "roofline_us": roofline_seconds(case.stages, ceilings) * 1e6, "contestants": {}}  # fmt: skip
    calls, skipped = {}, dict(case.skipped)
    for who, contestant in case.contestants.items():
        try:
            calls[who], record["contestants"][who] = enter(case, contestant, at.device)
        except Exception as reason:  # a peer's failure, whatever it is, belongs in the report beside the others' times
            if who == OURS:
                raise
            skipped[who] = f"{type(reason).__name__}: {reason}"
    seconds = interleave(calls, rounds, at.device, at.seed)
    add_times(record, seconds, ceilings, is_interpreted(at))
    return record, skipped


def enter(case: OpCase, contestant: Contestant, device: torch.device) -> tuple[Call, dict]:
    """Parity, and the call to time."""
    error = case.error(contestant.read(contestant.run()))
    call, is_graph = prepare(contestant.run, device)
    # written so that NaN is wrong
    return call, {"error": error, "bound": contestant.bound, "ok": error <= contestant.bound, "cuda_graph": is_graph}


def is_interpreted(at: Setting) -> bool:
    return at.backend == "triton" and at.device.type == "cpu"


def add_times(record: dict, seconds: dict[str, list[float]], ceilings: Ceilings, interpreted: bool) -> None:
    """What the seconds of all rounds make of a record; a speedup only over right answers, by a right answer.

    A speedup is the ratio of medians: within one round calls this short are too noisy to be compared.
    """
    ours, medians = record["contestants"][OURS], {who: statistics.median(found) for who, found in seconds.items()}
    for who, entry in record["contestants"].items():
        median = medians[who]
        bytes_rate, flops_rate = record["bytes"] / median, record["flops"] / median
        entry |= {
            "us": median * 1e6, "gb_per_s": bytes_rate / 1e9, "of_copy": bytes_rate / ceilings.bytes,
            "tflops": flops_rate / 1e12, "of_matmul": flops_rate / ceilings.flops,
            "of_roofline": record["roofline_us"] / 1e6 / median,
        }  # fmt: skip
        if who != OURS and entry["ok"] and ours["ok"] and not interpreted:
            entry["speedup"] = median / medians[OURS]


def find_wrong(records: list[dict]) -> list[str]:
    """A line for every contestant that is further off than it may be."""
    return [
        f"parity: {who} is off by {entry['error']:.1e} in {r['op']}, {r['batch']} x {r['tokens']} tokens; "
        f"at most {entry['bound']:.0e} is right"
        for r in records
        for who, entry in r["contestants"].items()
        if not entry["ok"]
    ]


@torch.inference_mode()
def main(
    op: Annotated[list[str] | None, typer.Option(help=f"{', '.join(OPS)} or all; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu; the GPU if there is one.")] = "",
    backend: Annotated[str, typer.Option(help="FastMMoE's: auto, triton or torch.")] = "auto",
    shape: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}; 30b on a GPU, small on a CPU.")] = "",
    tokens: Annotated[list[int] | None, typer.Option(help="Of a sample; may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Samples; may be repeated.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Times each contestant runs; the median counts.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: int = 0,
    budget: Annotated[float, typer.Option(help="Seconds; then no other case begins.")] = float("inf"),
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures into this file.")] = None,
) -> None:
    """Compare implementations of every op; exit status 1 if FastMMoE computes something wrong."""
    names = parse_ops(op or ["all"])
    where, backend = parse_device(device, backend)
    default_shape, sizes, default_rounds = DEFAULTS[where.type]
    check_choice("shape", shape or default_shape, tuple(SHAPES))
    check_numbers("tokens", tokens or [], LEAST_TOKENS)
    check_numbers("batch", batch or [], 1)
    rounds = default_rounds if rounds is None else rounds
    check_numbers("rounds", [rounds], 1)
    check_numbers("threads", [threads], 1)
    check_numbers("budget", [budget], 0)
    check_files(json_path, plot)
    if tokens or batch:
        sizes = tuple(itertools.product(tokens or dict.fromkeys(n for n, _ in sizes), batch or [1]))

    deadline = time.monotonic() + budget
    torch.set_num_threads(threads)
    dtype = DTYPES[where.type]
    ceilings = measure_ceilings(where, dtype, rounds)
    result = {
        "what": "ops, one by one", **provenance(where), "device": where.type, "backend": backend, "seed": seed,
        "interpreted": backend == "triton" and where.type == "cpu", "dtype": str(dtype).removeprefix("torch."),
        "rounds": rounds, "bytes": {name: FORMULAS[name] for name in names},
        "ceilings": {"tflops": ceilings.flops / 1e12, "tb_per_s": ceilings.bytes / 1e12, "source": ceilings.source},
        "skipped": {}, "left_out": [], "cases": [],
    }  # fmt: skip
    for name in names:
        if OPS[name].only_triton and backend != "triton":
            result["skipped"][name] = "FastMMoE's runs on Triton only, and the backend is torch"
    work = [(size, name) for size in sizes for name in names if name not in result["skipped"]]
    for number, ((count, samples), name) in enumerate(tqdm(work, desc="ops", unit="case")):
        if number and time.monotonic() > deadline:
            result["left_out"].append(f"{name}, {samples} x {count} tokens")
            continue
        at = Setting(SHAPES[shape or default_shape], count, samples, where, dtype, backend, seed)
        record, skipped = run_case(name, at, ceilings, rounds)
        result["cases"].append(record)
        result["skipped"] |= {f"{who} ({name}, {samples} x {count} tokens)": why for who, why in skipped.items()}
        # what there is stays if a later case fails
        write_json(result, json_path)

    print_report(result)
    write_json(result, json_path)
    if plot is not None and result["cases"]:
        draw(result, plot)
    wrong = find_wrong(result["cases"])
    for line in wrong:
        print(line)
    if any(line.startswith(f"parity: {OURS} ") for line in wrong):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
