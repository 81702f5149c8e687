"""Attention of the last token: torch backend and Triton against the float64 reference."""

import numpy as np
import oracle
import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmoe_kernels import last_query_attention
from fastmmoe_kernels.attention import _last_query_attention

BACKENDS = ("torch", "triton")
# keys per program for up to 32 query heads per key head
BLOCK = 128


def make_inputs(seed, batch, num_heads, num_kv_heads, num_keys, head_dim, dtype=torch.float32):
    """Query and key at unit scale."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, num_heads, head_dim, generator=generator)
    key = torch.randn(batch, num_kv_heads, num_keys, head_dim, generator=generator)
    return query.to(DEVICE, dtype), key.to(DEVICE, dtype)


def make_mask(lengths, num_keys, padding_side):
    position, length = torch.arange(num_keys), torch.tensor(lengths).unsqueeze(1)
    mask = position < length if padding_side == "right" else position >= num_keys - length
    return mask.to(DEVICE)


def make_sinks(seed, num_heads, dtype=torch.float32):
    return torch.randn(num_heads, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(query, key, backend, mask=None, sinks=None, scale=None, rtol=1e-5):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    got = last_query_attention(query, key, scale=scale, key_mask=mask, sinks=sinks, backend=backend)
    assert got.dtype == torch.float32 and got.shape == (key.shape[0], key.shape[2])
    mask = None if mask is None else mask.cpu().numpy()
    sinks = None if sinks is None else sinks.double().cpu().numpy()
    want = oracle.last_query_attention(query.double().cpu().numpy(), key.double().cpu().numpy(), scale, mask, sinks)
    np.testing.assert_allclose(got.cpu().numpy(), want, rtol=rtol, atol=1e-30)
    return got


@st.composite
def shapes(draw):
    kv_heads, group = draw(st.sampled_from([(1, 1), (3, 1), (1, 6), (2, 3), (1, 20)]))
    num_keys = draw(st.integers(1, 5) | st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17]))
    head_dim = draw(st.sampled_from([1, 7, 16, 65, 192]))
    lengths = draw(st.lists(st.integers(0, num_keys), min_size=1, max_size=3))
    return len(lengths), kv_heads * group, kv_heads, num_keys, head_dim, lengths


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    shape=shapes(),
    padding_side=st.sampled_from(["left", "right", None]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_equals_reference(backend, seed, shape, padding_side, dtype):
    *sizes, lengths = shape
    query, key = make_inputs(seed, *sizes, dtype)
    mask = None if padding_side is None else make_mask(lengths, key.shape[2], padding_side)
    got = check(query, key, backend, mask)
    valid = torch.ones_like(got, dtype=torch.bool) if mask is None else mask
    assert (got[~valid] == 0).all()
    torch.testing.assert_close(got.sum(1), valid.any(1).float(), rtol=1e-5, atol=0)


def make_head_mask(seed, batch, rows, num_keys, share=0.3):
    """Scattered keys for each row [B, Hm, n]; the last sample's last row has none."""
    mask = torch.rand(batch, rows, num_keys, generator=torch.Generator().manual_seed(seed)) < share
    mask[-1, -1] = False
    return mask.to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    shape=shapes(),
    rows_of=st.sampled_from([None, "samples", "key heads", "query heads"]),
    sink_dtype=st.sampled_from([None, torch.float32, torch.float16, torch.bfloat16]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_masks_per_head_and_sinks(backend, seed, shape, rows_of, sink_dtype, dtype):
    *sizes, lengths = shape
    batch, num_heads, num_kv_heads, num_keys, _ = sizes
    query, key = make_inputs(seed, *sizes, dtype)
    mask = None
    if rows_of == "samples":
        mask = make_mask(lengths, num_keys, "left")
    elif rows_of is not None:
        mask = make_head_mask(seed, batch, num_kv_heads if rows_of == "key heads" else num_heads, num_keys)
    sinks = None if sink_dtype is None else make_sinks(seed, num_heads, sink_dtype)
    got = check(query, key, backend, mask, sinks)
    seen = torch.ones_like(got, dtype=torch.bool) if mask is None else mask
    seen = seen.view(batch, -1, num_keys)  # [B, Hm, n]
    assert (got[~seen.any(1)] == 0).all()
    most = seen.any(2).float().mean(1)  # the share of heads that have a valid key
    if sinks is None:
        torch.testing.assert_close(got.sum(1), most, rtol=1e-5, atol=0)
    else:
        assert (got.sum(1) <= most).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 12], ids=lambda rows: f"Hm={rows}")
@pytest.mark.parametrize("kv_heads", [1, 4], ids=lambda heads: f"Hkv={heads}")
def test_rows_of_a_mask(backend, rows, kv_heads):
    """Twelve query heads: as many rows as key heads, more, fewer; and rows that begin within a group of heads."""
    query, key = make_inputs(19, 2, 12, kv_heads, BLOCK + 5, 16)
    check(query, key, backend, make_head_mask(20, 2, rows, BLOCK + 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_is_the_mask_of_a_sample(backend):
    query, key = make_inputs(21, 3, 6, 2, 2 * BLOCK, 16)
    mask = make_mask([0, 3, 2 * BLOCK], 2 * BLOCK, "left")
    want = check(query, key, backend, mask)
    for rows in (1, 2, 6):
        assert torch.equal(check(query, key, backend, mask.unsqueeze(1).expand(-1, rows, -1)), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_never_reads_what_is_masked_for_it(backend):
    """NaN in keys that no head reads is harmless; a head without valid keys adds zeros, whatever its keys hold."""
    query, key = make_inputs(22, 1, 4, 2, 40, 8)
    mask = make_head_mask(23, 1, 2, 40)  # a row per key head, the second without a valid key
    want = check(query, key, backend, mask)
    key = key.masked_fill(~mask.unsqueeze(-1), torch.nan)
    assert torch.equal(last_query_attention(query, key, scale=8**-0.5, key_mask=mask, backend=backend), want)
    # both heads of the first key head have a row of their own, and only one sees the NaN
    query, key = make_inputs(24, 1, 2, 1, 40, 8)
    key[0, 0, 7] = torch.nan
    mask = torch.ones(1, 2, 40, dtype=torch.bool, device=DEVICE)
    mask[0, 0, 7] = False
    assert last_query_attention(query, key, scale=1.0, key_mask=mask, backend=backend).isnan().all()
    mask[0, 1, 7] = False
    assert not last_query_attention(query, key, scale=1.0, key_mask=mask, backend=backend).isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_of_any_size(backend):
    """One that takes all, some that share, one of -inf: as none at all. No valid key: zeros, with every sink."""
    query, key = make_inputs(25, 2, 4, 2, BLOCK + 1, 16)
    mask = make_mask([BLOCK + 1, 0], BLOCK + 1, "left")
    for sinks in ([300.0, 300.0, 300.0, 300.0], [300.0, 2.0, -300.0, -torch.inf], [-torch.inf] * 4):
        got = check(query, key, backend, mask, torch.tensor(sinks, device=DEVICE))
        assert (got[1] == 0).all()
        if sinks[0] < 0:
            assert torch.equal(got, check(query, key, backend, mask))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_masks_and_sinks(backend):
    query, key = make_inputs(26, 2, 6, 3, 60, 8)
    mask = make_head_mask(27, 2, 3, 60).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    sinks = torch.stack((make_sinks(28, 6), torch.full((6,), torch.nan, device=DEVICE)), -1)[:, 0]
    assert not mask.is_contiguous() and not sinks.is_contiguous()
    check(query, key, backend, mask, sinks)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [
        (32, 4, 128),  # InternVL3.5-30B-A3B
        (10, 10, 128),  # DeepSeek-VL2 Tiny
        (16, 16, 192),  # DeepSeek-VL2 Small: latent attention, expanded
        (40, 1, 576),  # more heads than a program takes at 128 keys; many chunks of D
    ],
    ids=lambda v: f"{v}",
)
def test_heads_of_models(backend, num_heads, num_kv_heads, head_dim):
    check(*make_inputs(1, 1, num_heads, num_kv_heads, 150, head_dim), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_masked_keys_may_hold_nan(backend, padding_side):
    """A sample of one valid key, one with a whole block masked, one full, one with no valid key."""
    num_keys = 2 * BLOCK + 9
    query, key = make_inputs(2, 4, 6, 2, num_keys, 24)
    mask = make_mask([1, BLOCK, num_keys, 0], num_keys, padding_side)
    expected = check(query, key, backend, mask)
    key = key.masked_fill(~mask[:, None, :, None], torch.nan)
    got = last_query_attention(query, key, scale=24**-0.5, key_mask=mask, backend=backend)
    assert torch.equal(got, expected)
    assert got[0].max() == 1 and (got[3] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scattered_mask(backend):
    query, key = make_inputs(3, 2, 4, 2, 200, 16)
    mask = torch.rand(200, 2, generator=torch.Generator().manual_seed(4)) < 0.4
    check(query, key, backend, mask.t().to(DEVICE))  # a strided mask


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_valid_key_shows(backend):
    query, key = make_inputs(5, 2, 2, 1, 9, 8)
    key[0, 0, 4] = torch.nan
    got = last_query_attention(query, key, scale=0.3, backend=backend)
    assert got[0].isnan().all() and not got[1].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_scales(backend, scale):
    """Nearly uniform up to nearly one-hot over logits in the hundreds, whose rounding shows."""
    query, key = make_inputs(6, 1, 4, 4, 140, 32)
    query, key = query.round(), key.round()  # whole logits: exact in float32
    check(query, key, backend, scale=scale, rtol=1e-4)


def cache_view(key):
    """A slice of a longer cache."""
    cache = key.new_full((key.shape[0], key.shape[1], key.shape[2] + 5, key.shape[3]), torch.nan)
    cache[:, :, 2:-3] = key
    return cache[:, :, 2:-3]


LAYOUTS = {
    "cache": cache_view,
    "tokens-first": lambda key: key.transpose(1, 2).contiguous().transpose(1, 2),
    "features-first": lambda key: key.mT.contiguous().mT,
    "every-second": lambda key: torch.stack((key, torch.full_like(key, torch.nan)), -1).flatten(3)[..., ::2],
    "unaligned": lambda key: torch.cat((key.new_zeros(1), key.flatten()))[1:].view(key.shape),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_keys(backend, layout):
    """The same numbers in another layout give the same bits in Triton; PyTorch may sum in another order."""
    query, key = make_inputs(7, 2, 6, 2, 150, 32)
    got = check(query, LAYOUTS[layout](key), backend)
    if backend == "triton":
        assert torch.equal(got, last_query_attention(query, key, scale=32**-0.5, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", ["heads", "part of D", "samples"])
def test_expanded_keys(backend, shared):
    """Stride 0, as where latent attention shares one rotary key among all heads."""
    query, key = make_inputs(8, 2, 4, 4, 70, 24)
    if shared == "heads":
        key = key[:, :1].expand(-1, 4, -1, -1)
    elif shared == "samples":
        key = key[:1].expand(2, -1, -1, -1)
    else:
        key = key[..., :1].expand(-1, -1, -1, 24)
    assert 0 in key.stride()
    check(query, key, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_query_is_a_row_of_all_queries(backend):
    query, key = make_inputs(9, 2, 4, 2, 60, 16)
    rows = torch.full((2, 7, 4, 16), torch.nan, device=DEVICE)
    rows[:, -1] = query
    check(rows.transpose(1, 2)[:, :, -1], key, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "num_keys"), [(0, 5), (2, 0)])
def test_nothing_to_do(backend, batch, num_keys):
    query, key = make_inputs(10, batch, 4, 2, num_keys, 8)
    assert last_query_attention(query, key, scale=1.0, backend=backend).shape == (batch, num_keys)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bitwise(backend):
    query, key = make_inputs(11, 2, 8, 2, 3 * BLOCK + 1, 40)
    first, second = (last_query_attention(query, key, scale=0.2, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_keys_permutes_the_output(backend):
    query, key = make_inputs(12, 1, 4, 2, BLOCK + 30, 16)
    order = torch.randperm(key.shape[2], generator=torch.Generator().manual_seed(13)).to(DEVICE)
    torch.testing.assert_close(check(query, key[:, :, order], backend), check(query, key, backend)[:, order])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask_rows", [None, 0, 2, 4])
@pytest.mark.parametrize("has_sinks", [True, False])
def test_custom_op(backend, mask_rows, has_sinks):
    query, key = make_inputs(14, 2, 4, 2, 9, 8)
    mask = make_head_mask(14, 2, mask_rows, 9) if mask_rows else make_mask([9, 4], 9, "left")
    mask = None if mask_rows is None else mask
    sinks = make_sinks(14, 4) if has_sinks else None
    torch.library.opcheck(_last_query_attention, (query, key, mask, sinks, 0.25, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend):
    def attend(query, key, mask, sinks):
        return last_query_attention(query, key, scale=0.25, key_mask=mask, sinks=sinks, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for mask, sinks in ((make_mask([9, 4], 9, "left"), None), (make_head_mask(15, 2, 2, 9), make_sinks(15, 4))):
        inputs = *make_inputs(15, 2, 4, 2, 9, 8), mask, sinks
        assert torch.equal(compiled(*inputs), attend(*inputs))


GOOD = dict(query=torch.zeros(2, 4, 8), key=torch.zeros(2, 2, 5, 8), scale=0.5)


@pytest.mark.parametrize(
    ("wrong", "error", "name"),
    [
        (dict(query=None), TypeError, "query"),
        (dict(query=torch.zeros(2, 4, 1, 8)), ValueError, "query"),
        (dict(query=torch.zeros(2, 4, 8, dtype=torch.float64)), TypeError, "query"),
        (dict(query=torch.zeros(2, 0, 8)), ValueError, "key"),
        (dict(key=torch.zeros(2, 2, 5, 7)), ValueError, "key"),
        (dict(key=torch.zeros(1, 2, 5, 8)), ValueError, "key"),
        (dict(key=torch.zeros(2, 3, 5, 8)), ValueError, "key"),
        (dict(key=torch.zeros(2, 8, 5, 8)), ValueError, "key"),
        (dict(key=torch.zeros(2, 0, 5, 8)), ValueError, "key"),
        (dict(key=torch.zeros(2, 2, 5, 8, dtype=torch.float16)), TypeError, "key"),
        (dict(key=torch.zeros(2, 2, 5, 8, device="meta")), ValueError, "key"),
        (dict(scale=0.0), ValueError, "scale"),
        (dict(scale=-1.0), ValueError, "scale"),
        (dict(scale=float("inf")), ValueError, "scale"),
        (dict(scale=None), TypeError, "scale"),
        (dict(key_mask=torch.ones(2, 5)), TypeError, "key_mask"),
        (dict(key_mask=torch.ones(2, 4, dtype=torch.bool)), ValueError, "key_mask"),
        (dict(key_mask=torch.ones(5, dtype=torch.bool)), ValueError, "key_mask"),
        (dict(key_mask=[[True] * 5] * 2), TypeError, "key_mask"),
        (dict(key_mask=torch.ones(2, 2, 5)), TypeError, "key_mask"),
        (dict(key_mask=torch.ones(2, 2, 4, dtype=torch.bool)), ValueError, "key_mask"),
        (dict(key_mask=torch.ones(2, 0, 5, dtype=torch.bool)), ValueError, "key_mask"),
        (dict(key_mask=torch.ones(2, 3, 5, dtype=torch.bool)), ValueError, "key_mask"),
        (dict(key_mask=torch.ones(2, 8, 5, dtype=torch.bool)), ValueError, "key_mask"),
        (dict(key_mask=torch.ones(2, 4, 1, 5, dtype=torch.bool)), ValueError, "key_mask"),
        (dict(sinks=[0.0] * 4), TypeError, "sinks"),
        (dict(sinks=torch.zeros(2)), ValueError, "sinks"),
        (dict(sinks=torch.zeros(1, 4)), ValueError, "sinks"),
        (dict(sinks=torch.zeros(4, dtype=torch.int64)), TypeError, "sinks"),
        (dict(sinks=torch.zeros(4, device="meta")), ValueError, "sinks"),
        (dict(backend="fast"), ValueError, "backend"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else None,
)
def test_bad_input_names_the_argument(wrong, error, name):
    with pytest.raises(error, match=f"^{name}:"):
        last_query_attention(**GOOD | wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("num_keys", [1000, 4096 + 3, 16384])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(32, 4, 128), (16, 16, 192)], ids=["internvl3.5", "deepseek-vl2-small"]
)
def test_real_sizes(dtype, num_keys, num_heads, num_kv_heads, head_dim):
    query, key = make_inputs(16, 2, num_heads, num_kv_heads, num_keys, head_dim, dtype)
    mask = make_mask([num_keys, num_keys // 3], num_keys, "left")
    check(query, key, "triton", mask)
    check(query, LAYOUTS["tokens-first"](key), "triton")
    for rows in (num_kv_heads, num_heads):
        check(query, key, "triton", make_head_mask(16, 2, rows, num_keys, 0.1), make_sinks(16, num_heads, dtype))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """The last sample's keys start more than 2^31 elements into the tensor."""
    key = torch.zeros(5, 1, 2**22, 128, dtype=torch.bfloat16, device=DEVICE)
    query, tail = make_inputs(17, 5, 8, 1, 300, 128, torch.bfloat16)
    key[:, :, -300:] = tail
    mask = torch.zeros(5, 2**22, dtype=torch.bool, device=DEVICE)
    mask[:, -300:] = True
    got = last_query_attention(query, key, scale=0.1, key_mask=mask, backend="triton")
    assert torch.equal(got[:, :-300], torch.zeros_like(got[:, :-300]))
    want = oracle.last_query_attention(query.double().cpu().numpy(), tail.double().cpu().numpy(), 0.1)
    np.testing.assert_allclose(got[:, -300:].cpu().numpy(), want, rtol=1e-5)


@pytest.mark.gpu
def test_runs_in_a_cuda_graph():
    query, key = make_inputs(18, 2, 8, 2, 1000, 128, torch.bfloat16)
    mask = make_mask([1000, 300], 1000, "left")
    expected = last_query_attention(query, key, scale=0.1, key_mask=mask, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = last_query_attention(query, key, scale=0.1, key_mask=mask, backend="triton")
    graph.replay()
    assert torch.equal(out, expected)
