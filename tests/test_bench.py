"""The benchmark scripts: their arithmetic by hand, and tiny runs on the CPU."""

import ast
import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bench_experts
import contestants
import pytest
import torch
import tune_experts
import typer
from launches import record_launches
from roofline import ESTIMATE, Ceilings, ExpertsShape, expert_stages, padding_factor, roofline_seconds
from tile_table import replace_row
from timing import interleave
from workload import make_hidden, make_routing, make_weights, reference, routing_logits, worst_row_error

from fastmmoe_kernels.experts import kernel, tiles
from fastmmoe_kernels.experts.tiles import GemmTile

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
QWEN = bench_experts.SHAPES["A"]
SMALL = ExpertsShape("small", 24, 16, 6, (3, 1))


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_stages_by_hand():
    """200 pairs of 100 tokens, 10 experts of 1000 x 500, of which 9 have a token, 2 bytes per number."""
    shape = ExpertsShape("hand", 1000, 500, 10, (2,))
    gate_up, down, combine = expert_stages(shape, 100, 200, 9, 2)
    assert shape.flops(200) == gate_up.flops + down.flops == 4e8 + 2e8
    assert (gate_up.flops, down.flops, combine.flops) == (4e8, 2e8, 0)
    assert gate_up.bytes == 9 * 1000 * 1000 * 2 + 100 * 1000 * 2 + 200 * 500 * 2
    assert down.bytes == 9 * 500 * 1000 * 2 + 200 * 500 * 2 + 200 * 1000 * 2
    assert combine.bytes == 200 * 1000 * 2 + 100 * 1000 * 2


def test_roofline_by_hand():
    """gate_up 400 us of arithmetic (bytes: 184), down 200 (bytes: 96), combine 6 of bytes."""
    stages = expert_stages(ExpertsShape("hand", 1000, 500, 10, (2,)), 100, 200, 9, 2)
    ceilings = Ceilings(1e12, 1e11, "")
    assert [s.seconds(ceilings) for s in stages] == pytest.approx([400e-6, 200e-6, 6e-6])
    assert roofline_seconds(stages, ceilings) == pytest.approx(606e-6)
    assert roofline_seconds(stages, ceilings, padding=1.5) == pytest.approx(906e-6)
    # ten times the arithmetic: bytes are all that counts, and empty rows cost nothing
    fast = Ceilings(1e13, 1e11, "")
    assert roofline_seconds(stages, fast) == roofline_seconds(stages, fast, 1.5) == pytest.approx(286e-6)


def test_padding_by_hand():
    assert padding_factor([5, 0, 8, 1], 4) == (8 + 0 + 8 + 4) / 14
    assert padding_factor([4, 8], 4) == 1


@pytest.mark.parametrize(
    "tokens, top_k, want",
    [(4096, 4, 466), (4096, 8, 705), (8192, 4, 705), (8192, 8, 715), (16384, 4, 715), (16384, 8, 717)],
)
def test_rooflines_of_qwen_on_h200(tokens, top_k, want):
    """Figures worked out for the project before this code; two cases share one where they are nearly the same."""
    stages = expert_stages(QWEN, tokens, tokens * top_k, 128, 2)
    got = QWEN.flops(tokens * top_k) / roofline_seconds(stages, ESTIMATE) / 1e12
    assert got == pytest.approx(want, rel=0.01)
    weight_bound = [s.bytes / ESTIMATE.bytes > s.flops / ESTIMATE.flops for s in stages[:2]]
    assert weight_bound == [want == 466, want in (466, 705)]


@pytest.mark.parametrize("tokens, top_k, want", [(4096, 4, (466, 466)), (4096, 8, (580, 641)), (8192, 8, (639, 674)),
                                                 (16384, 8, (680, 698))])  # fmt: skip
def test_padded_rooflines_of_qwen_on_h200(tokens, top_k, want):
    """Likewise, with the rows that fill up tiles of 128 and of 64; there with another draw of the routing."""
    (record,) = bench_experts.estimate([replace(QWEN, top_k=(top_k,))], [tokens], ["uniform"], seed=0)
    got = record["padded_128_roofline_tflops"], record["padded_64_roofline_tflops"]
    assert got == pytest.approx(want, rel=0.015)


# --- workload ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, low, high", [("uniform", 1.0, 1.3), ("skewed", 3.0, 8.0)])
def test_routing(kind, low, high):
    logits = routing_logits(kind, 4096, 128, seed=3)
    assert torch.equal(logits, routing_logits(kind, 4096, 128, seed=3))
    assert not torch.equal(logits, routing_logits(kind, 4096, 128, seed=4))
    routing = make_routing(logits, 8, torch.bfloat16, CPU)
    assert all(len(set(row)) == 8 for row in routing.ids.tolist())
    assert routing.ids.dtype == torch.int32 and torch.equal(routing.ids.long(), routing.ids64)
    assert routing.counts == tuple((routing.ids == e).sum().item() for e in range(128))
    assert routing.pairs == 4096 * 8 and routing.active_experts == 128
    assert low < routing.imbalance == max(routing.counts) / (4096 * 8 / 128) < high
    assert torch.equal(routing.weights, routing.weights16.float())
    assert routing.weights.sum(1) == pytest.approx(1, abs=0.02)
    # neighbouring tokens choose alike only if there is a topic; a random pair shares 8 * 8 / 128 = 0.5 experts
    shared = (routing.ids[0::2, :, None] == routing.ids[1::2, None, :]).sum((1, 2)).float().mean().item()
    assert shared == pytest.approx(0.5, abs=0.05) if kind == "uniform" else shared > 1


def test_fewer_experts_are_the_first_of_more():
    logits = routing_logits("skewed", 60, 16, seed=0)
    most, fewer = (make_routing(logits, k, torch.float32, CPU) for k in (6, 3))
    off = make_routing(logits, 3, torch.float32, CPU, slots=6)
    assert torch.equal(fewer.ids, most.ids[:, :3]) and torch.equal(off.ids[:, :3], fewer.ids)
    assert (off.ids[:, 3:] == 16).all() and off.counts == fewer.counts


def test_unknown_routing():
    with pytest.raises(ValueError, match="routing: expected one of uniform, skewed, got 'zipf'"):
        routing_logits("zipf", 4, 4, 0)


def test_one_wrong_row_shows():
    weights, hidden = make_weights(SMALL, torch.float32, CPU, 0), make_hidden(SMALL, 500, torch.float32, CPU, 1)
    routing = make_routing(routing_logits("uniform", 500, 6, 2), 3, torch.float32, CPU)
    want = reference(hidden, weights, routing)
    # by the definition, slot by slot, of one token
    by_hand = torch.zeros(24, dtype=torch.float64)
    for expert, weight in zip(routing.ids64[7], routing.weights[7], strict=True):
        gate, up = (weights.gate_up[expert].double() @ hidden[7].double()).chunk(2)
        by_hand += weight.double() * (weights.down[expert].double() @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(want[7], by_hand)
    assert worst_row_error(want.float(), want) < 1e-6
    wrong = want.clone()
    wrong[123] *= 1.1
    assert worst_row_error(wrong, want) == pytest.approx(0.1)
    wrong[123, 4] = torch.nan
    assert not worst_row_error(wrong, want) <= 1e9


# --- timing -----------------------------------------------------------------------------------------------------------


def test_rounds():
    """Every call once per round, in changing order, the first round for warming up."""
    done = []
    calls = {name: lambda name=name: done.append(name) for name in "abc"}
    seconds = interleave(calls, 6, CPU)
    rounds = ["".join(done[i : i + 3]) for i in range(0, len(done), 3)]
    assert len(rounds) == 7 and all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 2
    assert {name: len(s) for name, s in seconds.items()} == {"a": 6, "b": 6, "c": 6}


def test_recorded_launches_run_again():
    """A stage launched alone writes what it wrote within the op; together they are the op."""
    weights, hidden = make_weights(SMALL, torch.float32, CPU, 0), make_hidden(SMALL, 20, torch.float32, CPU, 1)
    routing = make_routing(routing_logits("uniform", 20, 6, 2), 3, torch.float32, CPU)
    arguments = (weights.gate_up, weights.down, routing.ids, routing.weights)
    outputs = []
    launches = record_launches(lambda: outputs.append(kernel.moe_experts_triton(hidden, *arguments)))
    assert list(launches) == [
        "count_pairs_kernel", "place_pairs_kernel", "gate_up_kernel", "down_kernel", "combine_kernel"
    ]  # fmt: skip
    want = outputs[0].clone()
    outputs[0].fill_(torch.nan)
    launches["combine_kernel"]()
    assert torch.equal(outputs[0], want)
    # other tokens in the same place
    hidden.neg_()
    for launch in launches.values():
        launch()
    assert torch.equal(outputs[0], kernel.moe_experts_triton(hidden, *arguments))


# --- bench_experts ----------------------------------------------------------------------------------------------------


def run_script(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "bench" / script), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_bench_on_cpu(tmp_path):
    path, picture = tmp_path / "new" / "experts.json", tmp_path / "experts.png"
    case = "--device cpu --threads 1 --shape 64:32:8 --tokens 96 --top-k 2 --top-k 4 --rounds 3".split()
    done = run_script("bench_experts.py", *case, "--json", str(path), "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["dtype"] == "float32" and result["rounds"] == 3 and result["backend"] == "torch"
    assert {"cpu", "threads", "python"} <= result["machine"].keys() and result["versions"]["torch"] == torch.__version__
    assert result["command"].endswith("--json experts.json --plot experts.png")
    assert "sonicmoe" in result["skipped"] and f"skipped sonicmoe: {result['skipped']['sonicmoe']}"[:70] in done.stdout
    assert [(c["top_k"], c["routing"]) for c in result["cases"]] == [
        (4, "uniform"), (2, "uniform"), (4, "skewed"), (2, "skewed")
    ]  # fmt: skip
    for case in result["cases"]:
        assert case["pairs"] == 96 * case["top_k"] and case["pairs_per_expert"] == 12 * case["top_k"]
        flops = 6 * 64 * 32 * case["pairs"]
        names = ["fastmmoe", "grouped_mm", "eager"] + ["fastmmoe, 2 of 4 slots"] * (case["top_k"] == 2)
        assert list(case["contestants"]) == names
        for name, entry in case["contestants"].items():
            assert entry["ok"] and entry["error"] < 1e-5
            assert entry["tflops"] == pytest.approx(flops / entry["us"] / 1e6)
            assert entry["of_roofline"] == pytest.approx(case["roofline_us"] / entry["us"])
            bmm = case["bmm"]["gate_up"]["us"] + case["bmm"]["down"]["us"]
            assert entry["of_bmm"] == pytest.approx(bmm / entry["us"])
            assert ("speedup" in entry) == (not name.startswith("fastmmoe"))
        assert case["bmm"]["down"]["tflops"] == pytest.approx(flops / 3 / case["bmm"]["down"]["us"] / 1e6)
    saved = {s["contestant"]: s for s in result["savings"] if s["routing"] == "skewed"}
    assert list(saved) == ["fastmmoe", "grouped_mm", "eager", "fastmmoe, 2 of 4 slots"]
    full, half = (case["contestants"]["fastmmoe"]["us"] for case in result["cases"][2:])
    assert saved["fastmmoe"]["time_ratio"] == pytest.approx(half / full) and saved["eager"]["flops_ratio"] == 0.5
    assert picture.read_bytes().startswith(b"\x89PNG")


def bench_in_process(path, **options):
    """The script's main with Triton's interpreter, which the tests set."""
    tiny = dict(device="cpu", shape=["32:32:4"], tokens=[24], top_k=[2], routing=["skewed"], rounds=1, threads=1)
    bench_experts.main(**tiny | options, json_path=path)
    return json.loads(path.read_text())


def test_bench_of_triton_kernels(tmp_path):
    result = bench_in_process(tmp_path / "e.json", backend="triton", peer=["grouped_mm"])
    (case,) = result["cases"]
    assert case["contestants"]["fastmmoe"]["ok"] and "speedup" in case["contestants"]["grouped_mm"]
    # 12 pairs per expert: 16 rows per tile, at most 15 of them empty in each expert's last
    assert case["block_m"] == 16 and case["padding"] * 48 in range(48, 48 + 4 * 15 + 1, 16)
    assert list(case["kernels"]) == ["dispatch", "gate_up", "down", "combine"]
    assert case["kernels"]["gate_up"]["of_bmm"] > 0 and case["kernels"]["combine"]["tb_per_s"] > 0


def off_in_one_row(weights, backend):
    def run(hidden, routing):
        out = contestants.our_experts(weights, backend)(hidden, routing)
        out[5] *= 1.01
        return out

    return run


def test_no_speedup_while_ours_is_wrong(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_experts, "our_experts", off_in_one_row)
    with pytest.raises(SystemExit) as stopped:
        bench_in_process(tmp_path / "e.json", top_k=[2, 1])
    assert stopped.value.code == 1
    written, printed = (tmp_path / "e.json").read_text(), capsys.readouterr().out
    assert not json.loads(written)["cases"][0]["contestants"]["fastmmoe"]["ok"]
    assert '"speedup"' not in written and not re.search(r"\d\.\d\dx", printed)
    assert "WRONG" in printed and "parity: fastmmoe is off by" in printed
    assert not any(s["contestant"].startswith("fastmmoe") for s in json.loads(written)["savings"])


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_no_speedup_over_a_wrong_peer(monkeypatch, capsys, tmp_path, factor):
    eager = contestants.PEERS["eager"]
    monkeypatch.setitem(contestants.PEERS, "eager", lambda *a: lambda h, r: eager(*a)(h, r) * factor)
    (case,) = bench_in_process(tmp_path / "e.json")["cases"]
    assert "speedup" not in case["contestants"]["eager"] and "speedup" in case["contestants"]["grouped_mm"]
    assert "parity: eager is off by" in capsys.readouterr().out


def test_a_peer_that_fails_is_skipped(monkeypatch, tmp_path):
    def fails(hidden, routing):
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(contestants.PEERS, "eager", lambda *_: fails)
    result = bench_in_process(tmp_path / "e.json")
    assert result["skipped"]["eager"] == "RuntimeError: no kernel image"
    assert list(result["cases"][0]["contestants"]) == ["fastmmoe", "grouped_mm"]


def test_estimate(tmp_path, capsys):
    bench_experts.main(only_estimate=True, json_path=tmp_path / "e.json", plot=tmp_path / "e.png")
    result, printed = json.loads((tmp_path / "e.json").read_text()), capsys.readouterr().out
    assert result["machine"] is None and result["ceilings"]["source"].startswith("estimate, no GPU")
    assert "estimate, no GPU" in printed and len(result["cases"]) == 2 * 3 * 2 * 2
    assert not any("contestants" in case for case in result["cases"])
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")


# --- tune_experts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("gemm", ["gate_up", "down"])
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_candidates(target, gemm, block_m):
    shapes = [tune_experts.SHAPES["A"], tune_experts.SHAPES["B"]]
    start = tiles.TILES[target][block_m][gemm == "down"]
    found = [t for t in tune_experts.neighbours(start) if tune_experts.is_sensible(t, block_m, gemm, shapes, target)]
    assert start in found and 5 <= len(found) <= 17
    for tile in found:
        size = tiles.shared_memory(tile, target, block_m, 1 + (gemm == "gate_up"), 2)
        assert size <= tiles.SHARED_MEMORY[target]
        for value in (tile.block_n, tile.block_k, tile.num_warps, tile.group_m):
            assert value > 0 and value & (value - 1) == 0


@pytest.fixture
def tuner():
    tuner = tune_experts.Tuner([tune_experts.SHAPES["tiny"]], CPU, rounds=1, workers=1)
    return tuner


@pytest.mark.parametrize("seconds, wins", [(0.5, True), (0.995, False), (1.5, False)])
def test_tuner_takes_what_is_faster_than_noise(monkeypatch, tuner, seconds, wins):
    start, other = GemmTile(32, 32, 4, 2), GemmTile(32, 32, 4, 3)
    shape = tuner.shapes[0]
    tuner.compiled = {tune_experts.Job(shape, 16, "down", tile) for tile in (start, other)}
    times = {start: [1.0], other: [seconds]}
    monkeypatch.setattr(tune_experts, "interleave", lambda calls, *_: {tile: times[tile] for tile in calls})
    assert tuner.choose(16, "down", {start, other}, start) == (other if wins else start)
    assert [r["us"] for r in tuner.records] == [statistics.median(times[GemmTile(32, 32, 4, r["num_stages"])]) * 1e6
                                                for r in tuner.records]  # fmt: skip


def test_tuner_drops_what_is_wrong_or_did_not_compile(monkeypatch, tuner):
    # the table's, to which the others are compared, has 3 stages
    start, wrong, broken = (GemmTile(32, 32, 4, stages) for stages in (2, 4, 5))
    tuner.compiled = {tune_experts.Job(tuner.shapes[0], 16, "gate_up", tile) for tile in (start, wrong)}
    run = tune_experts.Inputs.run
    monkeypatch.setattr(
        tune_experts.Inputs, "run", lambda self, chosen: run(self, chosen) * (2 if chosen.gate_up == wrong else 1)
    )
    times = {start: [1.0], wrong: [0.1], broken: [0.1]}
    monkeypatch.setattr(tune_experts, "interleave", lambda calls, *_: {tile: times[tile] for tile in calls})
    assert tuner.choose(16, "gate_up", {start, wrong, broken}, start) == start
    assert [job.tile for job in tuner.failed] == [wrong] and len(tuner.records) == 1


def test_tuner_on_cpu(tmp_path):
    path = tmp_path / "tiles.json"
    case = "--device cpu --shape tiny --rows 16 --passes 1 --candidates 1 --rounds 1 --workers 1".split()
    done = run_script("tune_experts.py", *case, "--json", str(path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert {(r["block_m"], r["gemm"]) for r in result["timings"]} == {(16, "gate_up"), (16, "down")}
    assert not result["failed"] and all(r["us"] > 0 for r in result["timings"])
    assert result["row"][0].startswith('    "cpu": {  # tuned on ') and "\n".join(result["row"]) in done.stdout


def test_tuner_writes_only_what_a_gpu_found():
    with pytest.raises(typer.BadParameter, match="--write: expected --device cuda, got cpu"):
        tune_experts.main(device="cpu", write=True)


def test_table_is_rewritten():
    source = Path(tiles.__file__).read_text()
    row = {rows: (GemmTile(32, rows, 4, 2), GemmTile(64, 64, 8, 3, group_m=16)) for rows in (16, 32, 64, 128)}
    for target in [*tiles.TILES, "sm_75"]:
        changed = replace_row(source, target, row, "tuned on a card, today")
        assert f'    "{target}": {{  # tuned on a card, today\n' in changed
        assert max(map(len, changed.splitlines())) <= 120
        scope = {"__name__": "tiles", "__annotations__": {}}
        exec(compile(ast.parse(changed), "tiles.py", "exec"), scope)
        got = {name: repr(found) for name, found in scope["TILES"].items()}
        assert got == {name: repr(found) for name, found in (tiles.TILES | {target: row}).items()}
        assert replace_row(changed, target, row, "tuned on a card, today") == changed


# --- gpu.sh -----------------------------------------------------------------------------------------------------------

FAKE_PYTHON = """#!/usr/bin/env bash
# stands in for Python: tests pass, tuning fails after writing half its result, the other scripts write one
case "$*" in
    "-m pytest"*) exit 0 ;;
    *tune_experts*) echo half >"${@: -1}"; exit 3 ;;
    *) echo "$*" >"${@: -1}" ;;
esac
"""


def test_gpu_script_continues_and_resumes(tmp_path):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "OUT": str(out), "DRY_RUN": "1"}

    def run():
        return subprocess.run([ROOT / "bench" / "gpu.sh"], env=environment, capture_output=True, text=True, timeout=60)

    first = run()
    assert first.returncode == 1 and "FAILED tuning: status 3" in first.stdout
    names = {"parity.txt", "partial-tiles.json", "experts.json", "prefill.json", "experts.png", "log.txt"}
    assert {path.name for path in out.iterdir()} == names
    assert "bench_experts.py --device cpu" in (out / "experts.json").read_text()
    python.write_text(FAKE_PYTHON.replace("exit 3", "exit 0"))
    second = run()
    assert second.returncode == 0 and second.stdout.count("skipped") == 4
    assert {path.name for path in out.iterdir()} == names - {"partial-tiles.json"} | {"tiles.json"}
