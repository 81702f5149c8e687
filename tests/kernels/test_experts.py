"""The experts: torch backend and Triton against the float64 reference, at unit scale."""

from dataclasses import dataclass, field, replace

import numpy as np
import oracle
import pytest
import torch
from conftest import DEVICE, HAS_GPU
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastmmoe_kernels import moe_experts
from fastmmoe_kernels.experts import _moe_experts, dispatch, reference
from fastmmoe_kernels.experts.options import ExpertOptions
from fastmmoe_kernels.experts.tiles import SHARED_MEMORY, TILES, ExpertTiles, expert_tiles, most_pairs, shared_memory

BACKENDS = ("torch", "triton")
# largest error of an element, relative to the root mean square of its token's row
BOUND = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# backend and dtype; the interpreter multiplies the bits of bfloat16 numbers as if they were integers
RUNS = [(b, d) for b in BACKENDS for d in BOUND if HAS_GPU or (b, d) != ("triton", torch.bfloat16)]
all_runs = pytest.mark.parametrize("backend, dtype", RUNS, ids=lambda v: str(v).removeprefix("torch."))
both_backends = pytest.mark.parametrize("backend", BACKENDS)


@dataclass
class Case:
    """Arguments of `moe_experts`."""

    hidden: torch.Tensor
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    options: dict = field(default_factory=dict)

    def tensors(self) -> list[torch.Tensor]:
        return [self.hidden, self.gate_up_proj, self.down_proj, self.ids, self.weights]

    def arguments(self) -> tuple[torch.Tensor, ...]:
        return tuple(t.to(DEVICE) for t in self.tensors())

    def run(self, backend):
        options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in self.options.items()}
        return moe_experts(*self.arguments(), **options, backend=backend).cpu()


def make_case(num_tokens, num_experts, top_k, width, intermediate, *, dtype=torch.float32, ids=None, seed=0, **options):
    """Unit scale: every matrix product of these has variance near 1. Without `ids`, some slots hold no expert."""
    rng = torch.Generator().manual_seed(seed)
    rows = intermediate if options.get("activation") == "relu2" else 2 * intermediate
    if ids is None:
        ids = torch.randint(-1, num_experts + 1, (num_tokens, top_k), generator=rng, dtype=torch.int32)
    return Case(
        torch.randn(num_tokens, width, generator=rng).to(dtype),
        (torch.randn(num_experts, rows, width, generator=rng) / width**0.5).to(dtype),
        (torch.randn(num_experts, width, intermediate, generator=rng) / intermediate**0.5).to(dtype),
        ids,
        torch.rand(num_tokens, top_k, generator=rng) + 0.1,
        options,
    )


def lift(case):
    """Move what relu2 takes up by 2: else, of few columns, all may be near 0 or below, far from unit scale."""
    case.hidden[:, 0], case.gate_up_proj[:, :, 0] = 2, 1


def expected(case):
    options = {k: v.double().numpy() if isinstance(v, torch.Tensor) else v for k, v in case.options.items()}
    return torch.from_numpy(oracle.moe_experts(*(t.double().numpy() for t in case.tensors()), **options))


def assert_near(got, want, dtype):
    assert got.dtype == dtype and got.shape == want.shape
    error = (got.double() - want).abs()
    scale = want.square().mean(-1, keepdim=True).sqrt()
    # written so that NaN fails
    assert (error <= BOUND[dtype] * scale).all(), f"largest relative error {(error / scale).max()}"


def check(case, backend):
    assert_near(case.run(backend), expected(case), case.hidden.dtype)


@all_runs
@settings(max_examples=12, deadline=None)
@given(
    num_tokens=st.sampled_from([1, 2, 63, 70]),
    num_experts=st.integers(1, 6),
    top_k=st.integers(1, 3),
    width=st.sampled_from([8, 40, 64, 97]),
    intermediate=st.sampled_from([5, 32, 48, 70]),
    id_dtype=st.sampled_from([torch.int32, torch.int64]),
    weight_dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_equals_reference(
    backend, dtype, num_tokens, num_experts, top_k, width, intermediate, id_dtype, weight_dtype, seed
):
    case = make_case(num_tokens, num_experts, top_k, width, intermediate, dtype=dtype, seed=seed)
    check(replace(case, ids=case.ids.to(id_dtype), weights=case.weights.to(weight_dtype)), backend)


@all_runs
@pytest.mark.parametrize(
    "num_tokens, num_experts, top_k, width, intermediate",
    [
        pytest.param(1, 4, 1, 32, 32, id="T=1-K=1"),
        pytest.param(16, 2, 1, 130, 36, id="rows=16"),
        pytest.param(63, 3, 2, 36, 130, id="rows=32"),
        pytest.param(100, 1, 1, 72, 40, id="rows=64-partial"),
        pytest.param(260, 1, 1, 40, 72, id="rows=128-partial"),
        pytest.param(600, 2, 1, 16, 16, id="many-tiles"),
        pytest.param(5, 130, 3, 16, 16, id="more-experts-than-pairs"),
        pytest.param(9, 8, 8, 33, 17, id="K=E"),
    ],
)
def test_tile_shapes(backend, dtype, num_tokens, num_experts, top_k, width, intermediate):
    check(make_case(num_tokens, num_experts, top_k, width, intermediate, dtype=dtype), backend)


LAYOUTS = ("contiguous", "transposed", "rows apart", "transposed, rows apart", "experts last")


def laid_out(weight, layout):
    """The same numbers in another place: neighbours in one of the last two dimensions stay neighbours in memory."""
    if "apart" in layout:
        # what lies between must not be read
        room = torch.full((len(weight), weight.shape[1] + 3, weight.shape[2] + 5), torch.nan, dtype=weight.dtype)
        room = room.mT.contiguous().mT if "transposed" in layout else room
        room[:, 2:-1, 1:-4] = weight
        return room[:, 2:-1, 1:-4]
    if layout == "experts last":
        return weight.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    return weight.mT.contiguous().mT if layout == "transposed" else weight


ACTIVATIONS = [
    dict(),
    dict(activation="clamped_silu", limit=0.6),
    dict(activation="silu_clamped", limit=0.4),
    dict(activation="oai", limit=0.8),
    dict(activation="oai", limit=1.2, alpha=0.7),
    dict(activation="gelu_tanh"),
    dict(activation="relu2"),
]


@st.composite
def forms(draw, dtype):
    """Everything that experts of a model may differ in; limits lie where they cut many numbers."""
    options = draw(st.sampled_from(ACTIVATIONS))
    num_experts, width, intermediate = (draw(st.sampled_from(sizes)) for sizes in ((1, 3), (40, 64, 97), (5, 32, 70)))
    case = make_case(
        draw(st.sampled_from([1, 63])), num_experts, draw(st.integers(1, 2)), width, intermediate, dtype=dtype,
        seed=draw(st.integers(0, 2**31)), **options,
    )  # fmt: skip
    if case.options.get("activation") == "relu2":
        lift(case)
    else:
        case.options["interleaved"] = draw(st.booleans())
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    for name, size in (("gate_up_bias", case.gate_up_proj.shape[1]), ("down_bias", width)):
        bias_dtype = draw(st.sampled_from([None, dtype, torch.float32]))
        if bias_dtype is not None:
            case.options[name] = torch.randn(num_experts, size, generator=rng).to(bias_dtype)
    case.gate_up_proj = laid_out(case.gate_up_proj, draw(st.sampled_from(LAYOUTS)))
    case.down_proj = laid_out(case.down_proj, draw(st.sampled_from(LAYOUTS)))
    return case


@all_runs
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_forms_equal_reference(backend, dtype, data):
    check(data.draw(forms(dtype)), backend)


@all_runs
@pytest.mark.parametrize(
    "options",
    [*ACTIVATIONS, *(options | {"interleaved": True} for options in ACTIVATIONS if options != ACTIVATIONS[-1])],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_activations(backend, dtype, options):
    """Several column blocks, the last of them partial; interleaved in the layout of gpt-oss."""
    case = make_case(40, 2, 2, 72, 150, dtype=dtype, **options)
    case.options["gate_up_bias"] = torch.randn(2, case.gate_up_proj.shape[1])
    case.options["down_bias"] = torch.randn(2, 72).to(dtype)
    if "interleaved" in options:
        case.gate_up_proj, case.down_proj = (laid_out(w, "transposed") for w in (case.gate_up_proj, case.down_proj))
    check(case, backend)


@both_backends
@pytest.mark.parametrize("options", ACTIVATIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_nan_passes_every_activation(backend, options):
    """A clamp or a maximum of NaN is NaN."""
    case = make_case(3, 1, 1, 16, 8, ids=torch.zeros(3, 1, dtype=torch.int32), **options)
    case.hidden[1] = torch.nan
    got = case.run(backend)
    assert got[1].isnan().all() and got[::2].isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that is made, views of `given` ones left out."""

    def __init__(self, given):
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in self.given:
                self.size = max(self.size, made.numel())
        return out


@both_backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_not_copied(backend, layout):
    """All experts in every call: nothing is made that is as large as one expert's matrix."""
    from fastmmoe_kernels.experts.kernel import moe_experts_triton

    run = {"torch": reference.moe_experts_reference, "triton": moe_experts_triton}[backend]
    case = make_case(4, 3, 2, 96, 64)
    case.gate_up_proj, case.down_proj = (laid_out(w.to(DEVICE), layout) for w in (case.gate_up_proj, case.down_proj))
    assert case.gate_up_proj.is_contiguous() == (layout == "contiguous")
    arguments = case.arguments()
    # the op itself would hide what it calls
    with LargestTensor(arguments) as largest:
        got = run(*arguments, ExpertOptions())
    assert_near(got.cpu(), expected(case), torch.float32)
    assert 0 < largest.size < 64 * 96


@both_backends
@pytest.mark.parametrize("share", [0.0, 0.05, 1.0], ids=lambda s: f"others={s}")
def test_skewed_experts(backend, share):
    """Almost everything goes to expert 2 of 5; with a share of 0 the other experts are empty."""
    ids = torch.where(torch.rand(150, 2) < share, torch.randint(0, 5, (150, 2)), 2)
    check(make_case(150, 5, 2, 24, 40, ids=ids), backend)


@both_backends
def test_no_active_slot(backend):
    """Tokens with sentinels alone yield zeros, in a batch where others do not and in one where all do."""
    ids = torch.tensor([[0, 1], [3, 3], [-1, 7], [2, 3]])
    case = make_case(4, 3, 2, 16, 24, ids=ids)
    check(case, backend)
    assert (case.run(backend)[1:3] == 0).all()
    assert (replace(case, ids=torch.full_like(ids, 3)).run(backend) == 0).all()


@both_backends
@pytest.mark.parametrize("num_tokens, top_k", [(0, 2), (0, 0), (3, 0)], ids=["T=0", "T=0-K=0", "K=0"])
def test_nothing_to_do(backend, num_tokens, top_k):
    out = make_case(num_tokens, 3, top_k, 16, 8).run(backend)
    assert out.shape == (num_tokens, 16) and (out == 0).all()


@both_backends
def test_ids_far_out_of_range(backend):
    ids = torch.tensor([[0, 2**40], [-(2**40), 1], [2**31, 2**32]])
    want = replace(case := make_case(3, 2, 2, 16, 8, ids=ids), ids=torch.tensor([[0, 2], [2, 1], [2, 2]]))
    torch.testing.assert_close(case.run(backend), want.run(backend), rtol=0, atol=0)


@both_backends
def test_nan_stays_where_it_is(backend):
    """NaN in an unused expert, in an inactive slot's weight or in another token touches nothing."""
    ids = torch.randint(0, 3, (40, 2)) * 2  # experts 0, 2, 4
    ids[5:9, 1] = 6
    case = make_case(40, 6, 2, 24, 40, ids=ids)
    want = expected(case)
    case.gate_up_proj[1::2] = torch.nan
    case.down_proj[1::2] = torch.nan
    case.weights[ids == 6] = torch.nan
    case.hidden[17] = torch.nan
    got = case.run(backend)
    others = torch.arange(40) != 17
    assert_near(got[others], want[others], torch.float32)
    assert got[17].isnan().all()


@both_backends
def test_duplicate_experts(backend):
    """One expert in several slots of a token counts several times."""
    check(make_case(20, 4, 3, 24, 16, ids=torch.randint(0, 4, (20, 1)).expand(20, 3)), backend)


@both_backends
def test_large_gates(backend):
    """exp(-gate) overflows in float32."""
    case = make_case(30, 2, 2, 16, 16)
    check(replace(case, hidden=case.hidden * 300), backend)


@both_backends
def test_permuting_tokens_permutes_output(backend):
    case = make_case(70, 5, 3, 40, 24)
    order = torch.randperm(70)
    permuted = replace(case, hidden=case.hidden[order], ids=case.ids[order], weights=case.weights[order])
    torch.testing.assert_close(permuted.run(backend), case.run(backend)[order], rtol=1e-5, atol=1e-6)


@all_runs
def test_bitwise_repeatable(backend, dtype):
    case = make_case(70, 5, 3, 40, 24, dtype=dtype)
    torch.testing.assert_close(case.run(backend), case.run(backend), rtol=0, atol=0)


@both_backends
@pytest.mark.parametrize("how", ["rows", "columns", "transposed"])
def test_strided_arguments(backend, how):
    def strided(x):
        if how == "rows":
            return x.repeat_interleave(2, 0)[::2]
        return x.repeat_interleave(2, 1)[:, ::2] if how == "columns" else x.t().contiguous().t()

    case = make_case(63, 4, 2, 40, 24)
    other = replace(case, hidden=strided(case.hidden), ids=strided(case.ids), weights=strided(case.weights))
    assert not other.hidden.is_contiguous()
    torch.testing.assert_close(other.run(backend), case.run(backend), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_tiles_write_their_own_rows(dtype, monkeypatch):
    """Rows past the end of a tile belong to the next expert, or to nobody: inactive slots leave rows over."""
    case = make_case(50, 3, 2, 24, 40, dtype=dtype)
    active = int(((case.ids >= 0) & (case.ids < 3)).sum())
    assert active < 100
    made = []
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kw: made.append(new_empty(*args, **kw)) or made[-1])
    case.run("triton")
    buffers = {t.shape[1]: t for t in made if t.dim() == 2 and t.shape[0] == 100 and t.dtype == dtype}
    for width in (24, 40):
        assert not buffers[width][:active].isnan().any()
        assert buffers[width][active:].isnan().all()


def test_torch_backend_in_several_blocks(monkeypatch):
    """More rows per expert than are worked on at a time."""
    monkeypatch.setattr(reference, "ROWS", 24)
    check(make_case(130, 3, 2, 40, 24), "torch")


def active_pairs(case):
    """(expert, pair), expert by expert, of the slots that hold one."""
    flat = case.ids.flatten().tolist()
    return sorted((expert, pair) for pair, expert in enumerate(flat) if 0 <= expert < len(case.down_proj))


def lost_tokens(case, max_pairs):
    """bool [T]: tokens of pairs past the most that the host was told."""
    lost = torch.zeros(len(case.hidden), dtype=torch.bool)
    lost[[pair // case.ids.shape[1] for _, pair in active_pairs(case)[max_pairs:]]] = True
    return lost


@all_runs
@settings(max_examples=10, deadline=None)
@given(
    num_tokens=st.sampled_from([2, 40, 90]),
    num_experts=st.integers(1, 6),
    top_k=st.integers(1, 4),
    more=st.integers(-40, 60),
    seed=st.integers(0, 2**31),
)
@example(num_tokens=90, num_experts=6, top_k=3, more=0, seed=474)  # beyond the bound where each step was rounded
def test_most_pairs(backend, dtype, num_tokens, num_experts, top_k, more, seed):
    """As many as are active, or more, change nothing; where they are fewer, tokens of rows past them yield NaN."""
    case = make_case(num_tokens, num_experts, top_k, 40, 24, dtype=dtype, seed=seed)
    max_pairs = max(1, len(active_pairs(case)) + more)
    got, want = replace(case, options={"max_pairs": max_pairs}).run(backend), expected(case)
    lost = lost_tokens(case, max_pairs)
    assert got[lost].isnan().all()
    assert_near(got[~lost], want[~lost], dtype)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_most_pairs_is_a_count(value, error):
    with pytest.raises(error, match="max_pairs: expected"):
        replace(make_case(3, 2, 1, 8, 8), options={"max_pairs": value}).run("torch")


# --- dispatch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_chunks", [1, 2, 256])
@settings(max_examples=15, deadline=None)
@given(
    num_tokens=st.sampled_from([1, 17, 130]),
    num_experts=st.sampled_from([1, 3, 8, 150]),
    top_k=st.integers(1, 4),
    share=st.sampled_from([None, 0.5, 1.0, 1.5]),
    block_m=st.sampled_from([16, 64]),
    skew=st.sampled_from([0.0, 3.0, 50.0]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**31),
)
def test_dispatch(max_chunks, num_tokens, num_experts, top_k, share, block_m, skew, dtype, seed):
    """Against NumPy's stable sort; with few chunks, one chunk takes several blocks of pairs.

    `share`: of the active pairs, how many the host says there are at most.
    """
    rng = np.random.default_rng(seed)
    odds = np.exp(skew * rng.random(num_experts + 2))
    ids = rng.choice(num_experts + 2, (num_tokens, top_k), p=odds / odds.sum()) - 1
    active = int(((ids >= 0) & (ids < num_experts)).sum())
    most = None if share is None else max(1, int(share * active))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "MAX_CHUNKS", max_chunks)
        got = dispatch.dispatch_pairs(torch.from_numpy(ids).to(DEVICE, dtype), num_experts, block_m, most)

    flat = ids.reshape(-1)
    order = [pair for pair in np.argsort(flat, kind="stable") if 0 <= flat[pair] < num_experts]
    position = np.full(flat.size, -1)
    position[order] = np.arange(len(order))
    most = flat.size if most is None else most
    position[position >= most] = -2
    counts = np.bincount(flat[order], minlength=num_experts)
    ends = np.cumsum(counts)
    tiles = [
        (expert, first, min(end, most))
        for expert, (count, end) in enumerate(zip(counts, ends, strict=True))
        for first in range(end - count, end, block_m)
        if first < most
    ]
    assert len(got.tile_expert) <= (most + min(num_experts, most) * (block_m - 1)) // block_m
    assert all(t.dtype == torch.int32 for t in got)
    assert got.order[: len(order)].tolist() == order
    assert got.position.tolist() == position.tolist()
    schedule = torch.stack(got[2:], 1).tolist()
    assert [tuple(tile) for tile in schedule[: len(tiles)]] == tiles
    assert all(expert == -1 for expert, _, _ in schedule[len(tiles) :])


def test_dispatch_grid_is_the_worst_case():
    """One pair too many for each expert's full tiles: the host's bound is reached."""
    ids = torch.arange(4).repeat_interleave(17).reshape(-1, 1).to(DEVICE)
    got = dispatch.dispatch_pairs(ids, 4, 16)
    assert got.tile_expert.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


# --- tiles ------------------------------------------------------------------------------------------------------------

tile_arguments = st.tuples(
    st.sampled_from([*SHARED_MEMORY, "sm_75", "cpu"]),
    st.sampled_from(list(BOUND)),
    st.floats(0, 1e6),
    st.integers(1, 20_000),
    st.integers(1, 20_000),
)


@settings(deadline=None)
@given(tile_arguments)
def test_tiles_fit(arguments):
    target, dtype, _, hidden, intermediate = arguments
    tiles = expert_tiles(*arguments)
    assert tiles == expert_tiles(*arguments)
    limit = SHARED_MEMORY.get(target, 64 * 1024)
    shapes = [(tiles.gate_up, 2, hidden, intermediate), (tiles.down, 1, intermediate, hidden)]
    for tile, operands, inner, columns in shapes:
        assert shared_memory(tile, target, tiles.block_m, operands, dtype.itemsize) <= limit
        assert tile.num_stages >= 2
        for block, size in [(tile.block_n, columns), (tile.block_k, inner)]:
            assert block >= 16 and block & (block - 1) == 0 and block < 2 * max(size, 16)


@given(tile_arguments, st.floats(0, 1e6))
def test_tiles_grow_with_pairs_in_few_steps(arguments, more):
    target, dtype, pairs, *shape = arguments
    small, large = sorted((pairs, more))
    assert expert_tiles(target, dtype, small, *shape).block_m <= expert_tiles(target, dtype, large, *shape).block_m
    assert len({expert_tiles(target, dtype, p, *shape) for p in np.geomspace(0.1, 1e6, 200)}) <= 4


@pytest.mark.parametrize("target", TILES)
def test_shipped_tiles_are_not_clamped(target):
    """The table says what runs, for the models it was written for."""
    for block_m, (gate_up, down) in TILES[target].items():
        pairs = min(most_pairs(target)[block_m], 512)
        assert expert_tiles(target, torch.bfloat16, pairs, 2048, 768) == ExpertTiles(block_m, gate_up, down)


# --- the op -----------------------------------------------------------------------------------------------------------


@both_backends
def test_opcheck(backend):
    case = make_case(5, 3, 2, 16, 24)
    torch.library.opcheck(_moe_experts, (*case.arguments(), *ExpertOptions(), backend))
    case = make_case(5, 3, 2, 16, 24, activation="oai", limit=1.0, alpha=1.5, interleaved=True)
    biases = torch.randn(3, 48).to(DEVICE), torch.randn(3, 16).to(DEVICE)
    options = ExpertOptions(*biases, "oai", 1.0, 1.5, True)
    torch.library.opcheck(_moe_experts, (*case.arguments(), *options, backend))


@both_backends
def test_compiles_without_breaks(backend):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*arguments):
        return moe_experts(*arguments, backend=backend) * 2

    for num_tokens in (5, 9):
        case = make_case(num_tokens, 3, 2, 16, 24)
        torch.testing.assert_close(compiled(*case.arguments()).cpu(), case.run(backend) * 2, rtol=0, atol=0)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled_form(hidden, gate_up, down, *arguments, **options):
        return moe_experts(hidden, gate_up.mT, down.mT, *arguments, backend=backend, **options)

    case = make_case(5, 3, 2, 16, 24, activation="oai", limit=1, interleaved=True, down_bias=torch.randn(3, 16))
    hidden, gate_up, down, *arguments = case.arguments()
    options = case.options | {"down_bias": case.options["down_bias"].to(DEVICE)}
    got = compiled_form(hidden, gate_up.mT.contiguous(), down.mT.contiguous(), *arguments, **options)
    torch.testing.assert_close(got.cpu(), case.run(backend), rtol=1e-5, atol=1e-6)


def test_takes_parameters():
    """A model's weights require gradients, although the op gives none."""
    case = make_case(5, 3, 2, 16, 24)
    want = case.run("torch")
    case.gate_up_proj.requires_grad_()
    torch.testing.assert_close(case.run("torch").detach(), want, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("hidden", torch.zeros(5, 16, dtype=torch.float64), TypeError),
        ("hidden", torch.zeros(5, 2, 16), ValueError),
        ("hidden", [[0.0]], TypeError),
        ("gate_up_proj", torch.zeros(3, 24, 16), ValueError),
        ("gate_up_proj", torch.zeros(3, 48, 16, dtype=torch.float16), TypeError),
        ("gate_up_proj", torch.zeros(2, 48, 16), ValueError),
        ("down_proj", torch.zeros(3, 17, 24), ValueError),
        ("down_proj", torch.zeros(3, 16, 24, dtype=torch.bfloat16), TypeError),
        ("down_proj", torch.zeros(3, 16, 24, device="meta"), ValueError),
        ("ids", torch.zeros(5, 2), TypeError),
        ("ids", torch.zeros(4, 2, dtype=torch.int32), ValueError),
        ("weights", torch.zeros(5, 3), ValueError),
        ("weights", torch.zeros(5, 2, dtype=torch.int32), TypeError),
        ("gate_up_proj", torch.zeros(3, 96, 32)[:, ::2, ::2], ValueError),
        ("down_proj", torch.zeros(3, 32, 48)[:, ::2, ::2], ValueError),
        ("activation", "gelu", ValueError),
        ("limit", 7.0, ValueError),
        ("alpha", 1.0, ValueError),
        ("alpha", "1.702", TypeError),
        ("gate_up_bias", torch.zeros(3, 24), ValueError),
        ("gate_up_bias", torch.zeros(3, 48, dtype=torch.float16), TypeError),
        ("gate_up_bias", [0.0], TypeError),
        ("down_bias", torch.zeros(2, 16), ValueError),
        ("down_bias", torch.zeros(3, 16, dtype=torch.float64), TypeError),
        ("down_bias", torch.zeros(3, 16, device="meta"), ValueError),
        ("interleaved", 1, TypeError),
        ("backend", "cuda", ValueError),
    ],
)
def test_refuses(name, value, error):
    names = ("hidden", "gate_up_proj", "down_proj", "ids", "weights")
    arguments = dict(zip(names, make_case(5, 3, 2, 16, 24).arguments(), strict=True))
    if isinstance(value, torch.Tensor) and value.device.type == "cpu":
        value = value.to(DEVICE)
    with pytest.raises(error, match=f"^{name}: "):
        moe_experts(**arguments | {name: value})


@pytest.mark.parametrize(
    "options, name",
    [
        *((dict(activation=a), "limit") for a in ("clamped_silu", "silu_clamped", "oai")),
        *((dict(activation=a, limit=1.0), "limit") for a in ("gelu_tanh", "relu2")),
        *((dict(activation="oai", limit=value), "limit") for value in (0.0, -1.0, float("nan"), float("inf"))),
        (dict(activation="oai", limit=1.0, alpha=0.0), "alpha"),
        (dict(activation="clamped_silu", limit=1.0, alpha=1.0), "alpha"),
        (dict(activation="relu2", interleaved=True), "interleaved"),
        (dict(activation="relu2"), "gate_up_proj"),  # which has a gate's rows
        (dict(activation="relu2", gate_up_bias=torch.zeros(3, 48)), "gate_up_bias"),
    ],
    ids=lambda v: (
        "-".join(f"{key}={value}" for key, value in v.items() if key != "gate_up_bias") if isinstance(v, dict) else None
    ),
)
def test_refuses_what_an_activation_does_not_have(options, name):
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=f"^{name}: "):
        moe_experts(*make_case(5, 3, 2, 16, 24).arguments(), **options)


def test_tiles_without_a_gate_are_those_of_a_plain_product():
    for target in TILES:
        tiles = expert_tiles(target, torch.bfloat16, 1e6, 4096, 4096, has_gate=False)
        assert tiles.gate_up == tiles.down == expert_tiles(target, torch.bfloat16, 1e6, 4096, 4096).down


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def real_case(num_tokens, dtype, seed=0):
    """Qwen3-MoE 30B-A3B; vision tokens, four in five, activate 4 of 8 experts."""
    ids = torch.randn(num_tokens, 128, generator=torch.Generator().manual_seed(seed)).topk(8).indices.int()
    ids[torch.arange(num_tokens) % 5 != 0, 4:] = 128
    return make_case(num_tokens, 128, 8, 2048, 768, dtype=dtype, ids=ids, seed=seed)


def expected_on_device(hidden, gate_up_proj, down_proj, ids, weights):
    """Expert by expert in float64: what the C++ reference computes, in time."""
    out = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for e in range(len(down_proj)):
        token, slot = (ids == e).nonzero(as_tuple=True)
        gate, up = (hidden[token].double() @ gate_up_proj[e].double().T).chunk(2, -1)
        y = (gate * torch.sigmoid(gate) * up) @ down_proj[e].double().T
        out.index_add_(0, token, y * weights[token, slot].double().unsqueeze(1))
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUND, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("num_tokens", [1, 63, 512, 1500, 8192], ids=lambda t: f"T={t}")
@both_backends
def test_real_shapes(backend, num_tokens, dtype):
    arguments = real_case(num_tokens, dtype).arguments()
    got = moe_experts(*arguments, backend=backend)
    assert_near(got, expected_on_device(*arguments), dtype)
    torch.testing.assert_close(moe_experts(*arguments, backend=backend), got, rtol=0, atol=0)


@pytest.mark.gpu
def test_graph_capture_without_sync():
    """A captured graph serves other inputs of the same shape; nothing waits for the device."""
    arguments = real_case(300, torch.bfloat16).arguments()
    moe_experts(*arguments, backend="triton")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe_experts(*arguments, backend="triton")
        with torch.cuda.graph(graph):
            out = moe_experts(*arguments, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    other = real_case(300, torch.bfloat16, seed=1).arguments()
    for ours, theirs in zip(arguments, other, strict=True):
        ours.copy_(theirs)
    graph.replay()
    torch.testing.assert_close(out, moe_experts(*other, backend="triton"), rtol=0, atol=0)


@pytest.mark.gpu
def test_no_compilation_for_other_counts():
    from fastmmoe_kernels.experts import kernel

    compiled = [kernel.gate_up_kernel, kernel.down_kernel, kernel.combine_kernel]
    compiled += [dispatch.count_pairs_kernel, dispatch.place_pairs_kernel]

    def cache_sizes():
        return [len(caches[0]) for k in compiled for caches in k.device_caches.values()]

    moe_experts(*real_case(2000, torch.bfloat16).arguments(), backend="triton")
    before = cache_sizes()
    for num_tokens in (1999, 2048, 1777):
        moe_experts(*real_case(num_tokens, torch.bfloat16).arguments(), backend="triton")
    assert cache_sizes() == before


@pytest.mark.gpu
def test_more_elements_than_int32_counts():
    """140,000 tokens x 8 experts x 2,048 features: the last expert's rows lie beyond an int32 offset."""
    num_tokens = 140_000
    ids = torch.randn(num_tokens, 128, generator=torch.Generator().manual_seed(0)).topk(8).indices.int()
    case = make_case(num_tokens, 128, 8, 2048, 768, dtype=torch.bfloat16, ids=ids, seed=0)
    hidden, gate_up, down, ids, weights = case.arguments()
    got = moe_experts(hidden, gate_up, down, ids, weights, backend="triton")
    last = (ids == 127).any(1).nonzero()[-64:, 0]
    want = expected_on_device(hidden[last], gate_up, down, ids[last], weights[last])
    assert_near(got[last], want, torch.bfloat16)
    assert got.isfinite().all()
