"""The experts: torch backend and Triton against the float64 reference, at unit scale."""

from dataclasses import dataclass, replace

import numpy as np
import oracle
import pytest
import torch
from conftest import DEVICE, HAS_GPU
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmoe_kernels import moe_experts
from fastmmoe_kernels.experts import _moe_experts, dispatch, reference
from fastmmoe_kernels.experts.tiles import SHARED_MEMORY, TILES, ExpertTiles, expert_tiles, shared_memory

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

    def arguments(self) -> tuple[torch.Tensor, ...]:
        return tuple(t.to(DEVICE) for t in vars(self).values())

    def run(self, backend):
        return moe_experts(*self.arguments(), backend=backend).cpu()


def make_case(num_tokens, num_experts, top_k, width, intermediate, *, dtype=torch.float32, ids=None, seed=0):
    """Unit scale: every matrix product of these has variance near 1. Without `ids`, some slots hold no expert."""
    rng = torch.Generator().manual_seed(seed)
    if ids is None:
        ids = torch.randint(-1, num_experts + 1, (num_tokens, top_k), generator=rng, dtype=torch.int32)
    return Case(
        torch.randn(num_tokens, width, generator=rng).to(dtype),
        (torch.randn(num_experts, 2 * intermediate, width, generator=rng) / width**0.5).to(dtype),
        (torch.randn(num_experts, width, intermediate, generator=rng) / intermediate**0.5).to(dtype),
        ids,
        torch.rand(num_tokens, top_k, generator=rng) + 0.1,
    )


def expected(case):
    return torch.from_numpy(oracle.moe_experts(*(t.double().numpy() for t in vars(case).values())))


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


@both_backends
def test_transposed_weights(backend):
    """As some checkpoints store them: [E, H, 2I] and [E, I, H], seen through a transpose."""
    case = make_case(20, 3, 2, 40, 24)
    other = replace(
        case, gate_up_proj=case.gate_up_proj.mT.contiguous().mT, down_proj=case.down_proj.mT.contiguous().mT
    )
    torch.testing.assert_close(other.run(backend), case.run(backend), rtol=1e-5, atol=1e-6)


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


# --- dispatch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_chunks", [1, 2, 256])
@settings(max_examples=15, deadline=None)
@given(
    num_tokens=st.sampled_from([1, 17, 130]),
    num_experts=st.sampled_from([1, 3, 8, 150]),
    top_k=st.integers(1, 4),
    block_m=st.sampled_from([16, 64]),
    skew=st.sampled_from([0.0, 3.0, 50.0]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**31),
)
def test_dispatch(max_chunks, num_tokens, num_experts, top_k, block_m, skew, dtype, seed):
    """Against NumPy's stable sort; with few chunks, one chunk takes several blocks of pairs."""
    rng = np.random.default_rng(seed)
    share = np.exp(skew * rng.random(num_experts + 2))
    ids = rng.choice(num_experts + 2, (num_tokens, top_k), p=share / share.sum()) - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "MAX_CHUNKS", max_chunks)
        got = dispatch.dispatch_pairs(torch.from_numpy(ids).to(DEVICE, dtype), num_experts, block_m)

    flat = ids.reshape(-1)
    order = [pair for pair in np.argsort(flat, kind="stable") if 0 <= flat[pair] < num_experts]
    position = np.full(flat.size, -1)
    position[order] = np.arange(len(order))
    counts = np.bincount(flat[order], minlength=num_experts)
    ends = np.cumsum(counts)
    tiles = [
        (expert, first, end)
        for expert, (count, end) in enumerate(zip(counts, ends, strict=True))
        for first in range(end - count, end, block_m)
    ]
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
        pairs = {16: 8, 32: 32, 64: 128, 128: 512}[block_m]
        assert expert_tiles(target, torch.bfloat16, pairs, 2048, 768) == ExpertTiles(block_m, gate_up, down)


# --- the op -----------------------------------------------------------------------------------------------------------


@both_backends
def test_opcheck(backend):
    case = make_case(5, 3, 2, 16, 24)
    torch.library.opcheck(_moe_experts, (*case.arguments(), backend))


@both_backends
def test_compiles_without_breaks(backend):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*arguments):
        return moe_experts(*arguments, backend=backend) * 2

    for num_tokens in (5, 9):
        case = make_case(num_tokens, 3, 2, 16, 24)
        torch.testing.assert_close(compiled(*case.arguments()).cpu(), case.run(backend) * 2, rtol=0, atol=0)


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
        ("activation", "gelu", ValueError),
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
