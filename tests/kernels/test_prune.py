"""A prune stage: torch backend and Triton against the float64 reference."""

import oracle
import pytest
import torch
from conftest import DEVICE
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastmmoe_kernels import VisionLayout, prune_batch, prune_plan, prune_tokens, window_redundancy
from fastmmoe_kernels.prune import MERGE_METHODS, _prune_batch, kernel
from fastmmoe_kernels.redundancy import STRATEGIES

from .batches import Batch, batches, random_batch

BACKENDS = ("torch", "triton")
STAGE = dict(keep_ratio=0.5, merge_ratio=0.3, window=3, alpha=0.5, strategy="hybrid", merge_method="mlerp")
MARGIN = 1e-5  # float32 may decide closer calls otherwise; exact ties are tested by themselves


def random_source(batch):
    """Positions in a sequence of three times the length, as an earlier stage may leave them."""
    source = torch.rand(batch.valid.shape[0], 3 * batch.valid.shape[1]).argsort(1)[:, : batch.valid.shape[1]]
    return source.sort(1).values.masked_fill(~batch.valid, -1)


def check(batch, backend, dtype=torch.float32, rtol=1e-5, atol=1e-5, source=None, **stage):
    device = batch.to(DEVICE, dtype)
    got = prune_batch(
        device.hidden, device.residual, device.probs, device.importance, device.layout, backend=backend,
        source=None if source is None else source.to(DEVICE), **stage,
    )  # fmt: skip
    hidden, residual, origin, merged = oracle.prune_tokens(
        batch.hidden.numpy(), batch.residual.numpy(), batch.probs.numpy(), batch.importance.numpy(),
        batch.vision.numpy(), batch.valid.numpy(), padding_side=batch.padding_side, **stage,
    )  # fmt: skip
    origin = torch.from_numpy(origin)
    kept = origin.clamp_min(0)
    index = torch.where(origin >= 0, origin if source is None else source.gather(1, kept), -1)
    assert got.index.dtype == torch.int64 and got.index.tolist() == index.tolist()
    assert got.merged.dtype == torch.bool and got.merged.tolist() == merged.tolist()
    assert got.valid.dtype == torch.bool and got.valid.tolist() == (origin >= 0).tolist()
    for name, have, want in (("hidden", got.hidden, hidden), ("residual", got.residual, residual)):
        assert have.dtype == dtype and have.is_contiguous()
        want = torch.from_numpy(want).to(dtype)  # what overflows is infinite
        torch.testing.assert_close(have.cpu(), want, rtol=rtol, atol=atol, equal_nan=True, msg=name)

    # the new layout says what masks of the shorter batch would say
    shorter = VisionLayout.from_mask(batch.vision.gather(1, kept) & (origin >= 0), origin >= 0)
    assert torch.equal(got.layout.run_rank.cpu(), shorter.run_rank)
    for field in ("width", "lengths", "n_vision"):
        assert getattr(got.layout, field) == getattr(shorter, field), field
    for runs, target, merged in zip(batch.layout.runs, got.layout.n_vision, got.merged.sum(1).tolist(), strict=True):
        plan = prune_plan(runs, stage["keep_ratio"], stage["merge_ratio"], stage["window"])
        assert (plan.target, plan.merged) == (target, merged)
    return got


@st.composite
def stages(draw):
    return dict(
        keep_ratio=draw(st.sampled_from([0.01, 0.3, 0.5, 0.9, 1.0])),
        merge_ratio=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        window=draw(st.integers(1, 5)),
        alpha=draw(st.sampled_from([0.0, 0.3, 1.0])),
        strategy=draw(st.sampled_from(STRATEGIES)),
        merge_method=draw(st.sampled_from(MERGE_METHODS)),
    )


@pytest.mark.parametrize(("backend", "examples"), [("torch", 100), ("triton", 6)])
def test_equals_reference(backend, examples):
    @settings(max_examples=examples, deadline=None)
    @given(batch=batches(), stage=stages(), has_source=st.booleans())
    def run(batch, stage, has_source):
        scoring = {k: v for k, v in stage.items() if k != "merge_method"}
        margins = oracle.selection_margin(
            batch.probs.numpy(), batch.importance.numpy(), batch.vision.numpy(), batch.valid.numpy(), **scoring
        )
        assume(all((margin > MARGIN).all() for margin in margins))
        check(batch, backend, source=random_source(batch) if has_source else None, **stage)

    run()


def ties_in_any_precision(strategy, alpha, window, **_):
    """What is rounded may tie in one precision and not in another: a sum of two scores, the cosines of 3 tokens."""
    is_attention = strategy == "dynamic_attention" or strategy == "hybrid" and not alpha
    return (is_attention or strategy != "hybrid" or alpha == 1.0) and window in ((1, 2, 4) if is_attention else (1, 2))


@pytest.mark.parametrize(("backend", "examples"), [("torch", 100), ("triton", 6)])
def test_ties_go_to_the_earlier(backend, examples):
    """Scores of few values, exact in float32: most selections are decided by position."""

    @settings(max_examples=examples, deadline=None)
    @given(batch=batches(ties=True), stage=stages())
    def run(batch, stage):
        assume(ties_in_any_precision(**stage))
        check(batch, backend, **stage)

    run()


@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_tokens(backend):
    """All windows and tokens tie: the first windows merge, the first of the other tokens stay."""
    batch = random_batch(0, [31], 1.0, "left")
    batch.probs[:] = 0.125
    batch.importance[:] = 0.5
    got = check(batch, backend, **STAGE | dict(keep_ratio=0.4, merge_ratio=0.25))
    assert got.index[0].tolist() == [0, 3, 6, *range(9, 18)]
    assert got.merged[0].tolist() == [True] * 3 + [False] * 9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", ["hybrid", "dynamic_attention"])
def test_zeros_of_either_sign_tie(backend, strategy):
    """Ranks of 0.0 and -0.0 follow from position alone, among windows and among tokens."""
    batch = random_batch(11, [36], 1.0, "left")
    batch.probs[:] = 0.125
    batch.importance[:] = 0.0
    batch.importance[0, ::2] = -0.0
    batch.importance[0, 30:] = 1.0
    got = check(batch, backend, **STAGE | dict(alpha=0.0, strategy=strategy, keep_ratio=0.5, merge_ratio=0.2))
    assert got.index[0].tolist() == [0, 3, 6, *range(9, 18), *range(30, 36)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [16, 40], ids=lambda n: f"n={n}")
def test_row_in_several_blocks(n, ties, monkeypatch):
    """As many tokens as the selecting kernel takes at a time, and more, with ties across blocks."""
    monkeypatch.setattr(kernel, "BLOCK_N", 16)
    batch = random_batch(1, [n, n - 3], 0.97, "right", experts=3, features=2, ties=ties)
    check(batch, "triton", **STAGE | dict(window=2, alpha=1.0))


@pytest.mark.parametrize("n", [kernel.BLOCK_N - 1, kernel.BLOCK_N, kernel.BLOCK_N + 1], ids=lambda n: f"n={n}")
def test_row_around_a_block(n):
    """The block as shipped. Scores take few values: position decides, up to the block's end and behind it."""
    batch = random_batch(12, [n], 0.999, "left", experts=2, features=1, ties=True)
    check(batch, "triton", **STAGE | dict(keep_ratio=0.02, window=64, strategy="dynamic_attention"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_are_no_numbers(backend):
    """-inf is never selected, NaN is the largest; neither leads out of bounds. Widths are the plan's all the same."""
    nan, inf = float("nan"), float("inf")
    importance = torch.tensor([[-inf, 1.0, nan, -inf, inf, -nan, 2.0, -1e38], [-inf] * 6 + [3.0, -inf]])
    redundancy = torch.tensor([[nan, -inf, 0.5, -inf, inf, -inf, -0.5, -inf], [-inf] * 8])
    x, rank = torch.randn(2, 8, 3), torch.arange(8, dtype=torch.int32).repeat(2, 1)
    table = torch.tensor([[0, 0], [8, 8], [4, 3], [2, 2], [0, 1]], dtype=torch.int32)
    windows = torch.tensor([4, 4], dtype=torch.int32)
    arguments = [t.to(DEVICE) for t in (x, x, importance, redundancy, windows, rank, table)]
    _, _, index, merged, valid, _ = _prune_batch(*arguments, None, 4, 2, 2, "mean", backend)
    # two windows of the first sample, then its largest tokens; of the second all that can be selected
    assert index.tolist() == [[0, 2, 4, 6], [-1, 6, -1, -1]]
    assert merged.tolist() == [[True, False, True, False], [False] * 4]
    assert valid.tolist() == (index >= 0).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", [1, 130, 4100], ids=lambda h: f"H={h}")
def test_wide_rows(backend, features):
    """One feature, one past a power of two, and more than a block of the merging kernel."""
    check(random_batch(2, [14], 0.9, "left", features=features), backend, **STAGE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend):
    """fp16 in and out, arithmetic in fp32: only the final rounding differs."""
    batch = random_batch(3, [20, 13], 0.9, "left", features=33)
    batch.hidden, batch.residual = batch.hidden.half().float(), batch.residual.half().float()
    check(batch, backend, torch.float16, rtol=1e-3, atol=1e-6, **STAGE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_vectors_merge_to_zero(backend):
    batch = random_batch(4, [12], 1.0, "left")
    batch.hidden[:] = 0.0
    got = check(batch, backend, **STAGE)
    assert got.merged.any() and (got.hidden == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_goes_when_nothing_else_does(backend):
    batch = random_batch(5, [6, 4], 0.5, "left")
    batch.hidden = torch.nn.functional.pad(batch.hidden, (0, 0, 3, 0), value=float("nan"))
    batch.residual = torch.nn.functional.pad(batch.residual, (0, 0, 3, 0), value=float("nan"))
    batch.probs = torch.nn.functional.pad(batch.probs, (0, 0, 3, 0), value=float("nan"))
    batch.importance = torch.nn.functional.pad(batch.importance, (3, 0), value=float("nan"))
    batch.vision = torch.nn.functional.pad(batch.vision, (3, 0))
    batch.valid = torch.nn.functional.pad(batch.valid, (3, 0))
    got = check(batch, backend, **STAGE | dict(keep_ratio=1.0))
    assert got.index.tolist() == [[3, 4, 5, 6, 7, 8], [-1, -1, 5, 6, 7, 8]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_samples_that_are_not_pruned(backend, padding_side):
    """No vision token, and one: they keep all, beside samples that are pruned, and one that is nothing but vision."""
    batch = random_batch(13, [10, 16, 16, 15], 1.0, padding_side)
    batch.vision[0] = False
    batch.vision[1, :-1] = False
    batch.vision[2, 5:9] = False
    got = check(batch, backend, source=random_source(batch), **STAGE)
    assert got.layout.lengths == (10, 16, 10, 7) and got.layout.n_vision == (0, 1, 6, 7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_three_stages(backend, padding_side):
    """Each stage's index leads back to the first stage's input."""
    first = batch = random_batch(14, [30, 23], 0.9, padding_side, features=4)
    source = None
    was_merged = torch.zeros_like(batch.valid)
    for seed in range(3):
        got = check(batch, backend, source=source, **STAGE | dict(keep_ratio=0.7))
        source = got.index.cpu()
        kept = source.clamp_min(0)
        was_merged |= torch.zeros_like(was_merged).scatter_(1, kept, got.merged.cpu())
        untouched = got.valid.cpu() & ~was_merged.gather(1, kept)
        rows = first.hidden.gather(1, kept.unsqueeze(-1).expand(-1, -1, 4))
        assert torch.equal(got.hidden.cpu()[untouched], rows[untouched])

        scores = random_batch(seed, [got.layout.width] * 2, 1.0, padding_side)
        vision = got.layout.vision_mask.cpu()
        batch = Batch(
            got.hidden.cpu(), got.residual.cpu(), scores.probs.masked_fill(~vision.unsqueeze(-1), float("nan")),
            scores.importance.masked_fill(~vision, float("nan")), vision, got.valid.cpu(), padding_side,
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    """Streams that are slices of something larger, as a model may hand them over."""
    batch = random_batch(6, [15, 9], 0.9, "right", features=8)
    wide = torch.full((2, 15, 20), float("nan"))
    wide[..., 3:11] = batch.hidden
    batch.hidden = wide[..., 3:11]
    batch.residual = batch.residual.transpose(1, 2).contiguous().transpose(1, 2)
    device = batch.to(DEVICE, torch.float32)
    assert not device.hidden.is_contiguous() and not device.residual.is_contiguous()
    check(batch, backend, source=random_source(batch).t().contiguous().t(), **STAGE)


def arguments_of(batch, **extra):
    """The arguments of `prune_batch`, without NaN: torch compares them."""
    device = batch.to(DEVICE, torch.float32)
    streams = (device.hidden, device.residual, device.probs, device.importance)
    source = random_source(batch).to(DEVICE)
    return [x.nan_to_num() for x in streams], dict(layout=device.layout, source=source, **STAGE, **extra)


def tensors_of(pruned):
    return [*pruned[:4], pruned.layout.run_rank, pruned.valid]


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend):
    streams, options = arguments_of(random_batch(7, [40], 0.9, "left", ties=True), backend=backend)
    first, second = (tensors_of(prune_batch(*streams, **options)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prune_tokens_is_the_same_stage(backend):
    streams, options = arguments_of(random_batch(15, [14, 11], 0.9, "right"), backend=backend)
    layout = options.pop("layout")
    options["source"] = None
    want = prune_batch(*streams, layout, **options)
    del options["source"]
    got = prune_tokens(*streams, layout, **options)
    assert got._fields == want._fields[:5]
    for have, expected in zip(got[:4], want[:4], strict=True):
        assert torch.equal(have, expected)
    assert torch.equal(got.layout.run_rank, want.layout.run_rank)


@pytest.mark.parametrize("has_source", [False, True])
def test_compiles_to_one_graph(has_source):
    streams, options = arguments_of(random_batch(8, [12, 9], 0.9, "left"))
    if not has_source:
        options["source"] = None

    def stage(*streams):
        return tensors_of(prune_batch(*streams, **options))

    for have, want in zip(
        torch.compile(stage, fullgraph=True, backend="aot_eager")(*streams), stage(*streams), strict=True
    ):
        assert torch.equal(have, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("has_source", [False, True])
def test_opcheck(backend, has_source):
    batch = random_batch(16, [9, 4], 0.8, "right")
    (hidden, residual, _, importance), options = arguments_of(batch)
    redundancy = torch.where(options["layout"].run_rank % 3 == 0, importance, float("-inf"))
    windows = (redundancy >= 0).sum(1, dtype=torch.int32)
    table = torch.tensor([[0, 0], [9, 4], options["layout"].n_vision, [2, 1], [0, 0]], dtype=torch.int32, device=DEVICE)
    source = options["source"] if has_source else None
    torch.library.opcheck(
        _prune_batch,
        (hidden, residual, importance, redundancy, windows, options["layout"].run_rank, table, source, 9, 2, 3, "mlerp",
         backend),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(1, 4, 3)}, ValueError, "hidden"),
        ({"hidden": torch.zeros(1, 5, 3, dtype=torch.int32)}, TypeError, "hidden"),
        ({"residual": torch.zeros(1, 5, 4)}, ValueError, "residual"),
        ({"probs": torch.zeros(1, 5, 2, dtype=torch.bfloat16)}, TypeError, "probs"),
        ({"importance": torch.zeros(5)}, ValueError, "importance"),
        ({"layout": [5]}, TypeError, "layout"),
        ({"keep_ratio": 0.0}, ValueError, "keep_ratio"),
        ({"keep_ratio": 1.1}, ValueError, "keep_ratio"),
        ({"merge_ratio": -0.1}, ValueError, "merge_ratio"),
        ({"window": 2.0}, TypeError, "window"),
        ({"alpha": "x"}, TypeError, "alpha"),
        ({"strategy": "none"}, ValueError, "strategy"),
        ({"merge_method": "max"}, ValueError, "merge_method"),
        ({"source": torch.zeros(1, 4, dtype=torch.int64)}, ValueError, "source"),
        ({"source": torch.zeros(1, 5, dtype=torch.int32)}, TypeError, "source"),
        ({"keep_by": "norm"}, ValueError, "keep_by"),
        ({"targets": [2]}, ValueError, "expected one of the two"),
        ({"keep_ratio": None}, ValueError, "expected one of the two"),
        ({"keep_ratio": None, "targets": [2]}, ValueError, "merge_ratio"),
        ({"keep_ratio": None, "merge_ratio": 0.0, "targets": [2, 2]}, ValueError, "targets"),
        ({"keep_ratio": None, "merge_ratio": 0.0, "targets": [6]}, ValueError, r"targets\[0\]"),
        ({"keep_ratio": None, "merge_ratio": 0.0, "targets": [2.0]}, TypeError, r"targets\[0\]"),
    ],
)
def test_bad_input_is_named(change, error, message):
    layout = VisionLayout.from_mask(torch.ones(1, 5, dtype=torch.bool))
    arguments = dict(
        hidden=torch.zeros(1, 5, 3), residual=torch.zeros(1, 5, 3), probs=torch.zeros(1, 5, 2),
        importance=torch.zeros(1, 5), layout=layout, **STAGE,
    )  # fmt: skip
    with pytest.raises(error, match=message):
        prune_batch(**arguments | change)


@pytest.mark.parametrize(("backend", "examples"), [("torch", 50), ("triton", 4)])
def test_targets_in_place_of_a_ratio(backend, examples):
    """Each sample keeps as many vision tokens as it is told to: the most important ones."""

    @settings(max_examples=examples, deadline=None)
    @given(batch=batches(ties=True), data=st.data())
    def run(batch, data):
        check_targets(batch, backend, [data.draw(st.integers(0, n)) for n in batch.layout.n_vision])

    run()


def check_targets(batch, backend, targets):
    stage = STAGE | dict(keep_ratio=None, targets=targets, merge_ratio=0.0)
    device = batch.to(DEVICE, torch.float32)
    got = prune_batch(
        device.hidden, device.residual, device.probs, device.importance, device.layout, backend=backend, **stage
    )
    assert got.layout.n_vision == tuple(targets)
    for sample, target in enumerate(targets):
        vision = batch.vision[sample].nonzero().flatten().tolist()
        # sorted() is stable: the earlier of equals stays in front
        kept = sorted(vision, key=lambda i, s=sample: -batch.importance[s, i].item())[:target]
        text = (batch.valid[sample] & ~batch.vision[sample]).nonzero().flatten().tolist()
        assert got.index[sample][got.valid[sample]].tolist() == sorted(kept + text)


@pytest.mark.parametrize(("backend", "examples"), [("torch", 50), ("triton", 4)])
def test_keep_by_redundancy(backend, examples):
    """Outside merged windows the tokens of the least redundant windows stay."""

    @settings(max_examples=examples, deadline=None)
    @given(batch=batches(), stage=stages())
    def run(batch, stage):
        check_keep_by_redundancy(batch, backend, **stage)

    run()


def check_keep_by_redundancy(batch, backend, **stage):
    device = batch.to(DEVICE, torch.float32)
    got = prune_batch(
        device.hidden, device.residual, device.probs, device.importance, device.layout, backend=backend,
        keep_by="redundancy", **stage,
    )  # fmt: skip
    scoring = {name: stage[name] for name in ("window", "alpha", "strategy")}
    _, _, scores = window_redundancy(device.probs, device.importance, device.layout, backend=backend, **scoring)
    scores = scores.tolist()
    for sample, windows in enumerate(batch.layout.windows(stage["window"])):
        own, scores = scores[: len(windows)], scores[len(windows) :]
        plan = prune_plan(batch.layout.runs[sample], stage["keep_ratio"], stage["merge_ratio"], stage["window"])
        if plan.target == batch.layout.n_vision[sample]:
            continue
        order = sorted(range(len(windows)), key=lambda j, own=own: -own[j])  # most redundant first, then earliest
        merged = set(order[: plan.merged])
        outside = [(own[j], i) for j, window in enumerate(windows) if j not in merged for i in window]
        kept = {i for _, i in sorted(outside)[: plan.target - plan.merged]} | {windows[j][0] for j in merged}
        survivors = got.index[sample][got.valid[sample]].tolist()
        assert {i for i in survivors if batch.vision[sample, i]} == kept


def real_batch(dtype):
    """InternVL3.5-30B shapes, two samples of 13 and 7 tiles."""
    batch = random_batch(9, [3428, 1892], 0.98, "left", experts=128, features=2048)
    batch.hidden, batch.residual = batch.hidden.to(dtype).float(), batch.residual.to(dtype).float()
    return batch


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_real_size_on_gpu(dtype, strategy):
    """float32 scores may call near-ties differently."""
    batch = real_batch(dtype)
    rtol = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    stage = STAGE | dict(strategy=strategy, merge_ratio=0.025)
    check(batch, "triton", dtype, rtol=rtol, atol=1e-5, source=random_source(batch), **stage)


@pytest.mark.gpu
def test_barriers_hold_on_gpu():
    """Keys and merged heads pass between threads through memory: a missing barrier would show up now and then."""
    batch = random_batch(17, [9000] * 64, 0.98, "left", experts=8, features=8, ties=True)
    streams, options = arguments_of(batch, backend="triton")
    options |= dict(window=2, alpha=1.0)  # scores of few values in any precision
    want = tensors_of(prune_batch(*streams, **options | dict(backend="torch")))[2:]
    for _ in range(50):
        for have, expected in zip(tensors_of(prune_batch(*streams, **options))[2:], want, strict=True):
            assert torch.equal(have, expected)


@pytest.mark.gpu
def test_graph_and_memory_on_gpu():
    """A stage runs in a CUDA graph, and takes little memory beside its outputs."""
    streams, options = arguments_of(real_batch(torch.bfloat16), backend="triton")
    want = tensors_of(prune_batch(*streams, **options))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = tensors_of(prune_batch(*streams, **options))
    graph.replay()
    for have, expected in zip(got, want, strict=True):
        assert torch.equal(have, expected)
    got = tensors_of(prune_batch(*streams, **options))
    outputs = sum(x.numel() * x.element_size() for x in got)
    assert torch.cuda.max_memory_allocated() - before < 2 * outputs + streams[0].numel()
