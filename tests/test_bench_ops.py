"""`bench/bench_ops.py`: the naive forms are the ops, the arithmetic is right, and what is wrong has no speedup."""

import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import bench_ops
import naive_ops
import op_cases
import op_costs
import op_peers
import oracle
import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.batches import batches
from op_cases import OPS, Setting, routing_error
from op_costs import OpShape
from plot_ops import ratio_text
from roofline import Ceilings

import fastmmoe_kernels
from fastmmoe_kernels import (
    VisionLayout,
    gate_routing,
    last_query_attention,
    moe_experts,
    prune_batch,
    topk_routing,
    window_redundancy,
)
from fastmmoe_kernels.experts import dispatch

CPU = torch.device("cpu")
TINY = bench_ops.SHAPES["tiny"]
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
seeds = st.integers(0, 2**31)


def random_numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def few_numbers(seed: int, *shape: int) -> torch.Tensor:
    """Small integers: sums of them are exact, and many are equal."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


# --- naive forms ------------------------------------------------------------------------------------------------------


@BACKENDS
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(2, 9), st.sampled_from([random_numbers, few_numbers]), seeds, st.data())
def test_naive_routing(backend, tokens, experts, numbers, seed, data):
    """With ties too."""
    top_k = data.draw(st.integers(1, experts))
    vision_top_k = data.draw(st.integers(1, top_k))
    vision = random_numbers(seed + 1, tokens) > 0
    options = {"vision_mask": vision, "vision_top_k": vision_top_k, "backend": backend}
    logits = numbers(seed, tokens, experts)
    want = topk_routing(logits, top_k, **options)
    ids, weights = naive_ops.topk_routing(logits, top_k, vision, vision_top_k)
    assert torch.equal(ids, want.ids.long())
    torch.testing.assert_close(weights, want.weights)

    hidden, weight = few_numbers(seed, tokens, 6), few_numbers(seed + 1, experts, 6)
    want = gate_routing(hidden, weight, top_k, **options)
    logits, ids, weights = naive_ops.gate_routing(hidden, weight, top_k, vision, vision_top_k)
    assert torch.equal(logits, want.logits) and torch.equal(ids, want.ids.long())
    torch.testing.assert_close(weights, want.weights)


@BACKENDS
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), seeds)
def test_naive_attention(backend, batch, kv_heads, group, keys, seed):
    queries = random_numbers(seed, batch, kv_heads * group, keys, 16)
    key = random_numbers(seed + 1, batch, kv_heads, keys, 16)
    query = queries[:, :, -1]
    want = last_query_attention(query, key, scale=0.3, backend=backend)
    torch.testing.assert_close(naive_ops.last_query_attention(query, key, 0.3), want)
    causal = torch.full((keys, keys), float("-inf")).triu(1)
    torch.testing.assert_close(op_peers.attention_map(queries, key, causal, 0.3), want)
    torch.testing.assert_close(op_peers.attention_row(query, key, 0.3), want)


@BACKENDS
@settings(max_examples=15, deadline=None)
@given(batches(), st.integers(1, 4), st.sampled_from([0.0, 0.3, 1.0]))
def test_naive_redundancy(backend, batch, window, alpha):
    """Several runs, short windows, padding, samples without vision tokens."""
    want = window_redundancy(
        batch.probs, batch.importance, batch.layout, window=window, alpha=alpha, strategy="hybrid", backend=backend
    )
    cut = [naive_ops.cut_windows(vision, window) for vision in batch.layout.vision_mask.tolist()]
    assert cut == [[list(members) for members in sample] for sample in batch.layout.windows(window)]
    samples = [naive_ops.window_redundancy(*x, alpha) for x in zip(batch.probs, batch.importance, cut, strict=True)]
    for parts, score in zip(zip(*samples, strict=True), want, strict=True):
        torch.testing.assert_close(torch.cat(parts), score, rtol=1e-5, atol=1e-6)


@BACKENDS
@settings(max_examples=25, deadline=None)
@given(batches(), st.integers(1, 4), st.sampled_from([0.2, 0.5, 0.8, 1.0]), st.sampled_from([0.0, 0.3, 1.0]))
def test_naive_prune(backend, batch, window, keep_ratio, merge_ratio):
    ratios = {"keep_ratio": keep_ratio, "merge_ratio": merge_ratio, "window": window, "alpha": 0.5}
    want = prune_batch(
        batch.hidden, batch.residual, batch.probs, batch.importance, batch.layout, **ratios, strategy="hybrid",
        merge_method="mlerp", backend=backend,
    )  # fmt: skip
    for b, valid in enumerate(batch.valid):
        tensors = (x[b][valid] for x in (batch.hidden, batch.residual, batch.probs, batch.importance))
        hidden, residual, index, merged = naive_ops.prune_sample(*tensors, batch.vision[b][valid].tolist(), **ratios)
        kept = want.valid[b]
        assert (want.index[b][kept] - int(valid.int().argmax())).tolist() == index
        assert want.merged[b][kept].tolist() == merged
        torch.testing.assert_close(hidden, want.hidden[b][kept], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(residual, want.residual[b][kept], rtol=1e-5, atol=1e-5)


@BACKENDS
def test_one_window_is_never_merged(backend):
    """Two windows of 3, two tokens to be left, all of them merged ones: one is."""
    ratios = {"keep_ratio": 0.34, "merge_ratio": 1.0, "window": 3, "alpha": 0.5}
    hidden, probs, importance = random_numbers(0, 6, 8), random_numbers(1, 6, 4).softmax(1), random_numbers(2, 6).abs()
    _, _, index, merged = naive_ops.prune_sample(hidden, hidden, probs, importance, [True] * 6, **ratios)
    assert sum(merged) == 1 and len(merged) == 2
    layout = VisionLayout.from_mask(torch.ones(1, 6, dtype=torch.bool))
    want = prune_batch(
        hidden[None], hidden[None], probs[None], importance[None], layout, **ratios, strategy="hybrid",
        merge_method="mlerp", backend=backend,
    )  # fmt: skip
    assert want.index[0].tolist() == index and want.merged[0].tolist() == merged


def test_a_merge_by_hand():
    """Mean (2, 0) of (4, 3) and (0, -3), the longest is 5: (5, 0); in half precision it is computed in single."""
    tokens = torch.tensor([[4.0, 3.0], [0.0, -3.0]])
    assert naive_ops.merge(tokens).tolist() == [5.0, 0.0]
    assert naive_ops.merge(300 * tokens.half()).tolist() == [1500.0, 0.0]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(2, 9), st.integers(1, 4), seeds)
def test_naive_dispatch(tokens, experts, top_k, seed):
    """Slots that are off stand among the others. With one expert, `torch.histc` takes its range from the ids."""
    ids = torch.randint(0, experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(seed)).int()
    order, ends = naive_ops.dispatch_pairs(ids, experts)
    want = dispatch.dispatch_pairs(ids, experts, 16)
    assert order.tolist() == want.order[: len(order)].tolist()
    is_tile = want.tile_expert >= 0
    assert ends[want.tile_expert[is_tile].long()].tolist() == want.tile_end[is_tile].tolist()
    sorted_order, sorted_ends, row = op_peers.sort_pairs(ids, experts)
    assert ids.flatten()[sorted_order].tolist() == sorted(ids.flatten().tolist())
    assert sorted_order[row].tolist() == list(range(ids.numel())) and sorted_ends.tolist() == ends.tolist()


@BACKENDS
def test_naive_experts(backend):
    hidden, weights = random_numbers(0, 20, 24), random_numbers(1, 20, 3).abs()
    gate_up, down = random_numbers(2, 6, 32, 24) / 5, random_numbers(3, 6, 24, 16) / 4
    ids = torch.randint(-1, 7, (20, 3), generator=torch.Generator().manual_seed(4)).int()
    want = moe_experts(hidden, gate_up, down, ids, weights, backend=backend)
    torch.testing.assert_close(naive_ops.moe_experts(hidden, gate_up, down, ids, weights), want, rtol=1e-4, atol=1e-5)


# --- what is right ----------------------------------------------------------------------------------------------------


def test_errors_of_a_routing():
    """Two tokens of three and one experts out of four."""
    probs = torch.tensor([[0.4, 0.1, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    counts = torch.tensor([3, 1])
    ids = torch.tensor([[0, 3, 2], [3, 4, 4]])
    weights = torch.tensor([[4 / 9, 3 / 9, 2 / 9], [1.0, 0.0, 0.0]])

    def error(row, slot, expert=None, weight=None):
        changed = ids.clone(), weights.clone()
        for tensor, value in zip(changed, (expert, weight), strict=True):
            if value is not None:
                tensor[row, slot] = value
        return routing_error(changed, probs, counts)

    assert error(0, 0) < 1e-6
    assert error(0, 0, weight=4.04 / 9) == pytest.approx(0.01, rel=1e-5)
    assert error(0, 2, expert=1) >= 0.5  # half as good as the right one
    assert error(1, 0, expert=2) == pytest.approx(0.25)
    exchanged = ids[:, [1, 0, 2]][:1], weights[:, [1, 0, 2]][:1]
    assert routing_error(exchanged, probs[:1], counts[:1]) == pytest.approx(1 / 3)
    infinite = [error(0, 2, expert=0), error(0, 2, expert=4), error(1, 1, expert=0), error(1, 2, weight=0.1)]
    assert infinite == [float("inf")] * 4 and error(0, 2, expert=-1) == float("inf")
    assert not error(0, 1, weight=float("nan")) <= 1e9


@pytest.mark.parametrize("device", bench_ops.DEFAULTS)
def test_inputs_leave_no_doubt_what_is_pruned(device):
    """Rounding errors of single precision change no choice at the sizes that are measured."""
    name, sizes, _ = bench_ops.DEFAULTS[device]
    for tokens, batch in sizes:
        at = Setting(bench_ops.SHAPES[name], tokens, batch, CPU, torch.float32, "torch")
        windows, kept = oracle.selection_margin(
            at.logits.softmax(1).view(batch, tokens, -1), at.importance, at.layout.vision_mask, None,
            keep_ratio=op_cases.KEEP_RATIO, merge_ratio=op_cases.MERGE_RATIO, window=op_cases.WINDOW,
            alpha=op_cases.ALPHA, strategy="hybrid",
        )  # fmt: skip
        # float32 scores are off by 2e-7; importance is compared as it is
        assert windows.min() > 2e-6 and kept.min() > 0


@pytest.mark.parametrize("tokens, text", [(16, 3), (500, 100), (1892, 100)])
def test_where_vision_tokens_stand(tokens, text):
    layout = Setting(TINY, tokens, 2, CPU, torch.float32, "torch").layout
    assert layout.n_vision == (tokens - text,) * 2 and layout.runs == ((tokens - text,),) * 2
    assert layout.tails == (text - text // 2,) * 2


# --- arithmetic -------------------------------------------------------------------------------------------------------

HAND = OpShape("hand", 1000, 500, 10, 4, 2, 8, 2, 64)


@pytest.mark.parametrize(
    "stages, flops, size",
    [
        # 100 tokens, 2 bytes per number
        (op_costs.routing_cost(HAND, 100), 0, 4000 + 100 + 3200),
        (op_costs.gate_cost(HAND, 100, 2), 2_000_000, 200_000 + 20_000 + 100 + 4000 + 3200),
        # 3 samples of 50 keys; 8 query heads, 2 key heads
        (op_costs.attention_cost(HAND, 3, 50, 2), 2 * 3 * 8 * 50 * 64, 3 * (2 * 8 * 64 + 2 * 2 * 50 * 64 + 4 * 50)),
        # 3 samples of 50 tokens, of 150 are 120 vision tokens
        (op_costs.redundancy_cost(HAND, 3, 150, 120), 0, 4800 + 480 + 600 + 3 * 600 + 12),
        # 70 rows made of 80
        (op_costs.prune_cost(HAND, 150, 120, 80, 70, 2), 0, 4800 + 480 + 600 + 2 * 150 * 2000 + 70 * (8 + 1 + 1 + 4)),
        # 100 tokens of 4 slots, 250 of them on
        (op_costs.dispatch_cost(HAND, 100, 250), 0, 1600 + 1600 + 1000),
        # the figures of `test_stages_by_hand`
        (op_costs.experts_cost(HAND, 100, 200, 9, 2), 6e8,
         18_200_000 + 200_000 + 9_000_000 + 200_000 + 400_000 * 2 + 200_000),
    ],
)  # fmt: skip
def test_costs_by_hand(stages, flops, size):
    assert sum(stage.flops for stage in stages) == flops
    assert sum(stage.bytes for stage in stages) == size


def test_rows_that_a_prune_stage_reads():
    """64 tokens, 52 of them vision tokens in 17 windows of 3 and one of 1: 41 stay, one of them for a window of 3."""
    at = Setting(TINY, 64, 1, CPU, torch.float32, "torch")
    (stage,) = OPS["prune"].build(at).stages
    width = 12 + 41
    assert stage.bytes == op_costs.prune_cost(TINY, 64, 52, width - 1 + 3, width, 4)[0].bytes


def test_times_by_hand():
    """1 GB and 2 TFLOP in the median of 2 s, at ceilings of 1 GB/s and 4 TFLOP/s; a round that was slow for all."""
    entries = {who: {"ok": True} for who in ("fastmmoe", "slow")} | {"wrong": {"ok": False}}
    record = {"bytes": 1e9, "flops": 2e12, "roofline_us": 1e6, "contestants": entries}
    seconds = {"fastmmoe": [2.0, 50.0, 1.0], "slow": [6.0, 250.0, 5.0], "wrong": [1.0, 1.0, 1.0]}
    bench_ops.add_times(record, seconds, Ceilings(4e12, 1e9, ""), interpreted=False)
    assert entries["fastmmoe"] == {
        "ok": True, "us": 2e6, "gb_per_s": 0.5, "of_copy": 0.5, "tflops": 1.0, "of_matmul": 0.25, "of_roofline": 0.5
    }  # fmt: skip
    # of the medians, as they are printed; in the rounds it is 3, 5 and 5
    assert entries["slow"]["speedup"] == 3.0 and "speedup" not in entries["wrong"]


@pytest.mark.parametrize("ratio, text", [(0.391, "0.39x"), (9.876, "9.88x"), (14.04, "14.0x"), (2531.14, "2531x")])
def test_ratios_in_the_picture(ratio, text):
    assert ratio_text(ratio) == text


# --- coverage ---------------------------------------------------------------------------------------------------------


def find_uncovered(module, names) -> list[str]:
    """Ops without a benchmark: public functions that have a backend."""
    covered = {name for op in OPS.values() for name in op.covers}
    functions = {name: getattr(module, name) for name in names}
    return [
        name
        for name, function in functions.items()
        if inspect.isfunction(function) and "backend" in inspect.signature(function).parameters and name not in covered
    ]


def test_every_op_has_a_benchmark():
    assert find_uncovered(fastmmoe_kernels, fastmmoe_kernels.__all__) == []
    for op in OPS.values():
        assert all(hasattr(fastmmoe_kernels, name) or hasattr(dispatch, name) for name in op.covers)
    assert set(OPS) == set(op_costs.FORMULAS)


def test_a_new_op_is_missed():
    def new_op(x, *, backend="auto"): ...

    assert find_uncovered(SimpleNamespace(new_op=new_op), ["new_op"]) == ["new_op"]


# --- bench_ops --------------------------------------------------------------------------------------------------------


def bench(path, **options) -> dict:
    tiny = dict(device="cpu", backend="torch", shape="tiny", tokens=[32], rounds=2, threads=1)
    bench_ops.main(**tiny | options, json_path=path)
    return json.loads(path.read_text())


def test_bench_on_cpu(tmp_path, capsys):
    picture = tmp_path / "ops.png"
    result = bench(tmp_path / "new" / "ops.json", tokens=[64, 32], batch=[2, 1], plot=picture)
    printed = capsys.readouterr().out
    assert {"cpu", "threads", "python"} <= result["machine"].keys()
    assert {"fastmmoe", "torch", "transformers"} <= result["versions"].keys()
    assert (result["backend"], result["dtype"], result["rounds"]) == ("torch", "float32", 2)
    assert not result["interpreted"] and not result["left_out"]
    assert result["skipped"] == {"dispatch": "FastMMoE's runs on Triton only, and the backend is torch"}
    assert "skipped dispatch" in printed and "its PyTorch backend on a CPU, not its kernels" in printed
    names = [name for name in OPS if name != "dispatch"]
    assert [(c["op"], c["batch"], c["tokens"]) for c in result["cases"]] == [
        (name, batch, tokens) for tokens in (64, 32) for batch in (2, 1) for name in names
    ]
    ceilings = result["ceilings"]
    for case in result["cases"]:
        assert case["vision_tokens"] == case["batch"] * (52 if case["tokens"] == 64 else 26)
        assert result["bytes"][case["op"]] in printed
        ours, *others = case["contestants"]
        assert ours == "fastmmoe" and "naive loops" in others
        if case["op"] != "experts":  # there, of three kernels
            floor = max(case["flops"] / ceilings["tflops"], case["bytes"] / ceilings["tb_per_s"]) / 1e6
            assert case["roofline_us"] == pytest.approx(floor)
        for who, entry in case["contestants"].items():
            assert entry["ok"] and 0 <= entry["error"] <= entry["bound"] <= 3e-4
            assert entry["gb_per_s"] == pytest.approx(case["bytes"] / entry["us"] / 1e3)
            assert entry["tflops"] == pytest.approx(case["flops"] / entry["us"] / 1e6)
            assert entry["of_copy"] == pytest.approx(entry["gb_per_s"] / ceilings["tb_per_s"] / 1e3)
            assert entry["of_matmul"] == pytest.approx(entry["tflops"] / ceilings["tflops"])
            assert entry["of_roofline"] == pytest.approx(case["roofline_us"] / entry["us"])
            assert ("speedup" in entry) == (who != "fastmmoe")
    peers = {case["op"]: list(case["contestants"])[1:-1] for case in result["cases"]}
    assert peers == {
        "routing": ["transformers router"], "gate": ["transformers router"], "attention": ["attention map", "one row"],
        "budget": [], "redundancy": [], "prune": [], "experts": ["grouped_mm"],
    }  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_of_triton_kernels_has_no_speedups(tmp_path, capsys):
    """The interpreter's times are no kernel's."""
    result = bench(tmp_path / "o.json", backend="triton", tokens=[16], rounds=1, plot=tmp_path / "o.png")
    printed = capsys.readouterr().out
    assert result["interpreted"] and [case["op"] for case in result["cases"]] == list(OPS) and not result["skipped"]
    assert all(entry["ok"] for case in result["cases"] for entry in case["contestants"].values())
    assert all(("torch" in case["contestants"]) == (case["op"] != "dispatch") for case in result["cases"])
    assert '"speedup"' not in (tmp_path / "o.json").read_text() and not re.search(r"\d\.\d\dx", printed)
    assert "interpreter" in printed


def scaled(tensor):
    return tensor * 1.01


def spoil(monkeypatch, name):
    """Make the op compute something wrong."""

    def replace(module, function, change):
        right = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *args, **kwargs: change(right(*args, **kwargs)))

    changes = {
        "routing": (op_cases, "topk_routing", lambda out: out._replace(weights=scaled(out.weights))),
        "gate": (op_cases, "gate_routing", lambda out: out._replace(logits=out.logits + 0.001)),
        "budget": (op_cases, "choose_experts", lambda out: out.roll(1)),
        "attention": (op_cases, "last_query_attention", lambda out: torch.cat((scaled(out[:, :1]), out[:, 1:]), 1)),
        "redundancy": (op_cases, "window_scores", lambda out: (scaled(out[0]), *out[1:])),
        "prune": (op_cases, "prune_batch", lambda out: out._replace(index=out.index.roll(1))),
        "dispatch": (dispatch, "dispatch_pairs", lambda out: out._replace(position=out.position.flip(0))),
        "experts": (op_cases, "our_experts", lambda run: lambda *args: scaled(run(*args))),
    }
    replace(*changes[name])


@pytest.mark.parametrize("name", OPS)
def test_no_speedup_while_ours_is_wrong(monkeypatch, tmp_path, capsys, name):
    spoil(monkeypatch, name)
    backend = "triton" if OPS[name].only_triton else "torch"
    with pytest.raises(SystemExit) as stopped:
        bench(tmp_path / "o.json", op=[name], backend=backend)
    assert stopped.value.code == 1
    written, printed = (tmp_path / "o.json").read_text(), capsys.readouterr().out
    assert not json.loads(written)["cases"][0]["contestants"]["fastmmoe"]["ok"]
    assert '"speedup"' not in written and not re.search(r"\d\.\d\dx", printed)
    assert "WRONG" in printed and "parity: fastmmoe is off by" in printed


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_no_speedup_over_a_wrong_peer(monkeypatch, tmp_path, capsys, factor):
    right = op_peers.attention_row
    monkeypatch.setattr(op_peers, "attention_row", lambda *arguments: right(*arguments) * factor)
    (case,) = bench(tmp_path / "o.json", op=["attention"])["cases"]
    assert "speedup" not in case["contestants"]["one row"] and "speedup" in case["contestants"]["attention map"]
    assert "parity: one row is off by" in capsys.readouterr().out


def test_a_peer_that_fails_is_skipped(monkeypatch, tmp_path, capsys):
    def fails(*_):
        raise MemoryError("n x n")

    monkeypatch.setattr(op_peers, "attention_map", fails)
    result = bench(tmp_path / "o.json", op=["attention"])
    assert result["skipped"] == {"attention map (attention, 1 x 32 tokens)": "MemoryError: n x n"}
    assert list(result["cases"][0]["contestants"]) == ["fastmmoe", "one row", "naive loops"]
    assert "skipped attention map (attention, 1 x 32 tokens): MemoryError: n x n" in capsys.readouterr().out


def test_no_case_begins_when_the_budget_is_spent(tmp_path, capsys):
    result = bench(tmp_path / "o.json", op=["prune", "gate", "prune"], tokens=[32, 16], budget=0.0)
    assert [case["op"] for case in result["cases"]] == ["prune"]
    assert result["left_out"] == ["gate, 1 x 32 tokens", "prune, 1 x 16 tokens", "gate, 1 x 16 tokens"]
    assert "left out, the budget was spent: gate, 1 x 32 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        ({"op": ["experts", "softmax"]}, "--op: expected one of routing, .*, all, got 'softmax'"),
        ({"device": "tpu"}, "--device: expected one of .*cpu, got 'tpu'"),
        ({"backend": "cuda"}, "--backend: expected one of auto, triton, torch, got 'cuda'"),
        ({"shape": "8b"}, "--shape: expected one of 30b, small, tiny, got '8b'"),
        ({"tokens": [32, 15]}, "--tokens: expected 16 or more, got 15"),
        ({"batch": [0]}, "--batch: expected 1 or more, got 0"),
        ({"rounds": 0}, "--rounds: expected 1 or more, got 0"),
        ({"threads": 0}, "--threads: expected 1 or more, got 0"),
        ({"budget": -1.0}, "--budget: expected 0 or more, got -1"),
        ({"plot": Path("x.foo")}, "--plot: expected a file that ends in .png, .svg, .pdf, got x.foo"),
        ({"plot": Path(__file__) / "x.png"}, "--plot: .*x.png: "),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(typer.BadParameter, match=message) as refused:
        bench(tmp_path / "o.json", **options)
    assert "\n" not in str(refused.value) and not (tmp_path / "o.json").exists()


def test_triton_without_an_interpreter(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(typer.BadParameter, match="--backend: backend='triton': a tensor on 'cpu' needs"):
        bench(tmp_path / "o.json", backend="triton")
