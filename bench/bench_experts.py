"""Time of the experts block, FastMMoE's and its peers', against each other and against what the device allows.

    python bench/bench_experts.py --json experts.json --plot experts.png      # on the GPU, if there is one
    python bench/bench_experts.py --estimate --plot roofline.png              # no measurement, the ceilings of an H200

Every contestant's output is first compared with a float64 reference; who fails gets no speedup, and if it is FastMMoE,
nobody does. Contestants, both numbers of experts per token, the kernels one by one and same-shape `torch.bmm` run in
turn, round after round; the medians count. TFLOP/s are useful operations: rows that only fill a tile do not count.
"""

import itertools
import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from ceilings import DTYPES, measure_ceilings
from contestants import OURS, PEERS, Contestant, load_peers, our_experts, our_tiles
from plot_experts import draw
from provenance import provenance, write_json
from report_experts import print_report
from roofline import ESTIMATE, Ceilings, ExpertsShape, Stage, expert_stages, padding_factor, roofline_seconds
from timing import Call, interleave, prepare
from tqdm import tqdm
from workload import (
    ERROR_BOUND,
    ROUTINGS,
    Routing,
    Weights,
    make_hidden,
    make_routing,
    make_weights,
    reference,
    routing_logits,
    worst_row_error,
)

from fastmmoe_kernels.backend import resolve_backend

SHAPES = {
    shape.name: shape
    for shape in (
        ExpertsShape("A", 2048, 768, 128, (8, 4)),  # Qwen3-30B-A3B: InternVL3.5, Qwen3-VL
        ExpertsShape("B", 2560, 1536, 72, (6, 3)),  # DeepSeek-VL2
        ExpertsShape("cpu-small", 512, 256, 8, (4, 2)),
        ExpertsShape("cpu-large", 1024, 512, 64, (8, 4)),
    )
}
# shapes, tokens and rounds where none are given. Most tokens first: an autotuner keeps what its first call finds best
DEFAULTS = {
    "cuda": (("A", "B"), (16384, 8192, 4096), 20),
    "cpu": (("cpu-small", "cpu-large"), (2048, 512, 64), 5),
}
DISPATCH_KERNELS = ("count_pairs_kernel", "place_pairs_kernel")


def parse_shape(text: str, top_k: list[int]) -> ExpertsShape:
    """A name, or H:I:E; `top_k`, largest first, instead of the shape's own."""
    if text in SHAPES:
        shape = SHAPES[text]
        return ExpertsShape(text, shape.hidden, shape.intermediate, shape.experts, tuple(top_k) or shape.top_k)
    try:
        hidden, intermediate, experts = map(int, text.split(":"))
    except ValueError:
        raise typer.BadParameter(f"--shape: expected {', '.join(SHAPES)} or H:I:E, got {text!r}") from None
    return ExpertsShape(text, hidden, intermediate, experts, tuple(top_k) or (2, 1))


def same_shape_bmm(weights: Weights, pairs: int) -> tuple[dict[str, Call], int]:
    """Both GEMMs as `torch.bmm` with the mean expert's rows for every expert; the calls, and the pairs they compute."""
    experts, hidden, intermediate = weights.down.shape
    rows = -(-pairs // experts)
    x = torch.randn(experts, rows, hidden, dtype=weights.down.dtype, device=weights.down.device)
    act = torch.randn(experts, rows, intermediate, dtype=x.dtype, device=x.device)
    calls = {
        "gate_up": lambda: torch.bmm(x, weights.gate_up.mT),
        "down": lambda: torch.bmm(act, weights.down.mT),
    }
    return calls, experts * rows


class Bench:
    """One shape's weights and contestants on one device; `skipped`: why a peer did not take part."""

    def __init__(
        self, shape: ExpertsShape, device: torch.device, backend: str, peers: list[str], ceilings: Ceilings,
        rounds: int, seed: int,
    ) -> None:  # fmt: skip
        self.shape, self.device, self.ceilings, self.rounds, self.seed = shape, device, ceilings, rounds, seed
        self.dtype = DTYPES[device.type]
        self.weights = make_weights(shape, self.dtype, device, seed)
        self.backend = resolve_backend(backend, self.weights.down)
        found, self.skipped = load_peers(peers, self.weights, shape)
        self.contestants = {OURS: our_experts(self.weights, self.backend)} | found

    def run(self, tokens: int, kind: str) -> list[dict]:
        """One record per number of experts per token; all of them take part in the same rounds."""
        hidden = make_hidden(self.shape, tokens, self.dtype, self.device, self.seed + 1)
        logits = routing_logits(kind, tokens, self.shape.experts, self.seed + 2)
        calls: dict[tuple, Call] = {}
        records = []
        for top_k in self.shape.top_k:
            record, more_calls = self._prepare(hidden, logits, kind, top_k)
            records.append(record)
            calls |= {(top_k, *key): call for key, call in more_calls.items()}
        seconds = interleave(calls, self.rounds, self.device, self.seed)
        for record in records:
            self._add_times(record, {key[1:]: s for key, s in seconds.items() if key[0] == record["top_k"]})
        return records

    def _prepare(
        self, hidden: torch.Tensor, logits: torch.Tensor, kind: str, top_k: int
    ) -> tuple[dict, dict[tuple, Call]]:
        """What is known before anything is timed, parity included, and what is to be timed."""
        routing = make_routing(logits, top_k, self.dtype, self.device)
        record = describe(self.shape, len(hidden), kind, top_k, routing, self.ceilings, self.dtype)
        if self.backend == "triton":
            tiles = our_tiles(self.shape, self.device, self.dtype, routing.pairs)
            record |= {"tiles": str(tiles), "block_m": tiles.block_m}
            record["padding"] = padding_factor(routing.counts, tiles.block_m)

        entrants = {name: (run, routing) for name, run in self.contestants.items()}
        most = max(self.shape.top_k)
        if top_k < most:
            # as the model layer calls it: vision tokens stand beside text tokens, and slots they do not use are off
            off = make_routing(logits, top_k, self.dtype, self.device, slots=most)
            entrants[f"{OURS}, {top_k} of {most} slots"] = (self.contestants[OURS], off)
        want = reference(hidden, self.weights, routing)
        record["contestants"], calls = {}, {}
        for name, (run, used) in entrants.items():
            entry = self._enter(name, run, hidden, used, want)
            if entry is not None:
                call, record["contestants"][name] = entry
                calls[("block", name)] = call

        bmm, record["bmm_pairs"] = same_shape_bmm(self.weights, routing.pairs)
        calls |= {("bmm", name): prepare(call, self.device)[0] for name, call in bmm.items()}
        if self.backend == "triton":
            # here, as everything of Triton's: the torch backend does without it
            from launches import record_launches

            launches = record_launches(lambda: self.contestants[OURS](hidden, routing))
            calls |= {("kernel", name): prepare(call, self.device)[0] for name, call in launches.items()}
        return record, calls

    def _enter(
        self, name: str, run: Contestant, hidden: torch.Tensor, routing: Routing, want: torch.Tensor
    ) -> tuple[Call, dict] | None:
        """Parity, and the call to time; None for a peer that does not run here."""
        try:
            error = worst_row_error(run(hidden, routing), want)
            call, is_graph = prepare(lambda: run(hidden, routing), self.device)
        except Exception as reason:  # a peer's failure, whatever it is, belongs in the report beside the others' times
            if name.startswith(OURS):
                raise
            self.skipped[name] = f"{type(reason).__name__}: {reason}"
            return None
        # written so that NaN is wrong
        return call, {"error": error, "ok": error <= ERROR_BOUND[self.dtype], "cuda_graph": is_graph}

    def _add_times(self, record: dict, seconds: dict[tuple, list[float]]) -> None:
        medians = {key: statistics.median(values) for key, values in seconds.items()}
        pairs, ours = record["pairs"], seconds["block", OURS]
        stages = expert_stages(self.shape, record["tokens"], pairs, record["active_experts"], self.dtype.itemsize)
        # torch.bmm computes the same number of rows for every expert, some more than there are pairs
        bmm = {name: medians["bmm", name] * pairs / record["bmm_pairs"] for name in ("gate_up", "down")}
        record["bmm"] = {
            stage.name: {"us": bmm[stage.name] * 1e6, "tflops": stage.flops / bmm[stage.name] / 1e12}
            for stage in stages
            if stage.name in bmm
        }
        for name, entry in record["contestants"].items():
            time = medians["block", name]
            entry |= {
                "us": time * 1e6,
                "tflops": self.shape.flops(pairs) / time / 1e12,
                "of_roofline": record["roofline_us"] / 1e6 / time,
                "of_bmm": sum(bmm.values()) / time,
            }
            if not name.startswith(OURS) and entry["ok"] and record["contestants"][OURS]["ok"]:
                # ratios of one round: what the machine did in that round cancels
                ratios = (peer / our for peer, our in zip(seconds["block", name], ours, strict=True))
                entry["speedup"] = statistics.median(ratios)
        if self.backend == "triton":
            record["kernels"] = kernel_records(
                stages, self.ceilings, bmm, {name: time for (what, name), time in medians.items() if what == "kernel"}
            )


def describe(
    shape: ExpertsShape, tokens: int, kind: str, top_k: int, routing: Routing, ceilings: Ceilings, dtype: torch.dtype
) -> dict:
    """A case and its floor: for its pairs alone, and with the rows that fill up tiles of 64 and of 128."""
    stages = expert_stages(shape, tokens, routing.pairs, routing.active_experts, dtype.itemsize)
    seconds, flops = roofline_seconds(stages, ceilings), shape.flops(routing.pairs)
    record = {
        "shape": shape.name, "hidden": shape.hidden, "intermediate": shape.intermediate, "experts": shape.experts,
        "tokens": tokens, "top_k": top_k, "routing": kind, "pairs": routing.pairs,
        "pairs_per_expert": routing.pairs / shape.experts, "active_experts": routing.active_experts,
        "imbalance": routing.imbalance, "roofline_us": seconds * 1e6, "roofline_tflops": flops / seconds / 1e12,
    }  # fmt: skip
    for rows in (64, 128):
        padded = roofline_seconds(stages, ceilings, padding_factor(routing.counts, rows))
        record[f"padded_{rows}_roofline_tflops"] = flops / padded / 1e12
    return record


def kernel_records(
    stages: tuple[Stage, ...], ceilings: Ceilings, bmm: dict[str, float], seconds: dict[str, float]
) -> dict[str, dict]:
    """Each kernel by itself; `seconds` by the kernel's name, `bmm` by the stage's."""
    records = {"dispatch": {"us": sum(seconds[name] for name in DISPATCH_KERNELS) * 1e6}}
    for stage in stages:
        time = seconds[f"{stage.name}_kernel"]
        record = {"us": time * 1e6, "of_roofline": stage.seconds(ceilings) / time}
        if stage.name in bmm:
            record |= {"tflops": stage.flops / time / 1e12, "of_bmm": bmm[stage.name] / time}
        else:
            record["tb_per_s"] = stage.bytes / time / 1e12
        records[stage.name] = record
    return records


def estimate(shapes: list[ExpertsShape], tokens: list[int], kinds: list[str], seed: int) -> list[dict]:
    """Records without a measurement, at the ceilings of an H200."""
    records = []
    for shape, count, kind in itertools.product(shapes, tokens, kinds):
        logits = routing_logits(kind, count, shape.experts, seed + 2)
        for top_k in shape.top_k:
            routing = make_routing(logits, top_k, torch.bfloat16, torch.device("cpu"))
            records.append(describe(shape, count, kind, top_k, routing, ESTIMATE, torch.bfloat16))
    return records


def find_savings(records: list[dict]) -> list[dict]:
    """What fewer experts per token save: time and operations relative to the most experts, per contestant."""

    def block(record: dict) -> tuple:
        return record["shape"], record["tokens"], record["routing"]

    most = {}
    for record in records:
        if record["top_k"] >= most.get(block(record), record)["top_k"]:
            most[block(record)] = record
    savings = []
    for record in records:
        full = most[block(record)]
        for name, entry in record["contestants"].items():
            # "fastmmoe, 4 of 8 slots" saves relative to "fastmmoe"
            base = full["contestants"].get(name.split(",")[0])
            if record is not full and base is not None and base["ok"] and entry["ok"]:
                savings.append(
                    {"shape": record["shape"], "tokens": record["tokens"], "routing": record["routing"],
                     "contestant": name, "from": full["top_k"], "to": record["top_k"],
                     "time_ratio": entry["us"] / base["us"], "flops_ratio": record["top_k"] / full["top_k"]}
                )  # fmt: skip
    return savings


def find_wrong(records: list[dict]) -> list[str]:
    """A line for every contestant that computed something else than the reference."""
    return [
        f"parity: {name} is off by {entry['error']:.1e} at {r['shape']}, {r['tokens']} x {r['top_k']}, {r['routing']}"
        for r in records
        for name, entry in r.get("contestants", {}).items()
        if not entry["ok"]
    ]


@torch.inference_mode()
def main(
    device: Annotated[str, typer.Option(help="cuda or cpu; the GPU if there is one.")] = "",
    shape: Annotated[list[str] | None, typer.Option(help=f"{', '.join(SHAPES)} or H:I:E; may be repeated.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="May be repeated.")] = None,
    top_k: Annotated[list[int] | None, typer.Option(help="Experts per token; may be repeated.")] = None,
    routing: Annotated[list[str] | None, typer.Option(help=f"{' or '.join(ROUTINGS)}; may be repeated.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help=f"{', '.join(PEERS)}; may be repeated.")] = None,
    backend: Annotated[str, typer.Option(help="FastMMoE's: auto, triton or torch.")] = "auto",
    rounds: Annotated[int | None, typer.Option(help="Times each contestant runs; the median counts.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: int = 0,
    only_estimate: Annotated[bool, typer.Option("--estimate", help="No measurement: rooflines of an H200.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw figures and rooflines into this file.")] = None,
) -> None:
    """Compare implementations of the experts; exit status 1 if FastMMoE computes something wrong."""
    torch.set_num_threads(threads)
    where = torch.device("cpu" if only_estimate else device or ("cuda" if torch.cuda.is_available() else "cpu"))
    default_shapes, default_tokens, default_rounds = DEFAULTS["cuda" if only_estimate else where.type]
    shapes = [parse_shape(text, sorted(top_k or (), reverse=True)) for text in shape or default_shapes]
    tokens, kinds, rounds = tokens or list(default_tokens), routing or list(ROUTINGS), rounds or default_rounds
    dtype = torch.bfloat16 if only_estimate else DTYPES[where.type]

    result = {"what": "experts block", **provenance(where), "device": where.type, "seed": seed,
              "dtype": str(dtype).removeprefix("torch."), "skipped": {}}  # fmt: skip
    if only_estimate:
        ceilings = ESTIMATE
        result["machine"] = None
    else:
        ceilings = measure_ceilings(where, dtype, rounds)
        result["rounds"] = rounds
    result["ceilings"] = {
        "tflops": ceilings.flops / 1e12, "tb_per_s": ceilings.bytes / 1e12, "source": ceilings.source
    }  # fmt: skip
    result["cases"] = estimate(shapes, tokens, kinds, seed) if only_estimate else []
    if not only_estimate:
        with tqdm(total=len(shapes) * len(tokens) * len(kinds), desc="experts", unit="case") as progress:
            for one_shape in shapes:
                bench = Bench(one_shape, where, backend, peer or list(PEERS), ceilings, rounds, seed)
                result["backend"] = bench.backend
                for count, kind in itertools.product(tokens, kinds):
                    result["cases"] += bench.run(count, kind)
                    result["skipped"] |= bench.skipped
                    # what there is stays if a later case fails
                    write_json(result, json_path)
                    progress.update()
        result["savings"] = find_savings(result["cases"])

    print_report(result)
    write_json(result, json_path)
    if plot is not None:
        draw(result, plot)
    wrong = find_wrong(result["cases"])
    for line in wrong:
        print(line)
    if any(line.startswith(f"parity: {OURS}") for line in wrong):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
