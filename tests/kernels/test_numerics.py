"""What is no number, ties, zeros and extremes: both backends against the float64 reference, as the ops' docstrings say.

NaN never leads out of bounds, and reaches no other token or sample. More of this is in the tests of each op.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from conftest import DEVICE

from fastmmoe_kernels import VisionLayout, last_query_attention, prune_batch

from . import test_attention as attention
from . import test_experts as experts
from . import test_prune as pruning
from . import test_redundancy as redundancy
from . import test_routing as routing
from .batches import random_batch

NAN, INF = float("nan"), float("inf")
SMALL = 1e-40  # a denormal number in float32
NO_NUMBERS = [NAN, -NAN, INF, -INF]
both_backends = pytest.mark.parametrize("backend", ("torch", "triton"))
# of a NaN row in NumPy, which the interpreter computes with
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN|divide by zero)")


def assert_same_bits(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


# --- routing: six experts, of which the kernel's block of eight holds two that do not exist --------------------------

LOGITS = {
    "all NaN": [NAN] * 6,
    "one NaN": [1.0, 3.0, 2.0, NAN, 0.0, -1.0],
    "NaN of either sign": [1.0, 3.0, -NAN, NAN, 0.0, -1.0],
    "one inf": [1.0, 3.0, 2.0, 0.0, INF, -1.0],
    "three inf": [1.0, INF, 2.0, INF, 0.0, INF],
    "some -inf": [-INF, 3.0, -INF, -INF, 0.0, -INF],
    "all -inf": [-INF] * 6,
    "inf, -inf and NaN": [-INF, 3.0, INF, NAN, 0.0, INF],
    "ties": [2.0, 1.0, 2.0, 2.0, 1.0, 2.0],
    "all zero": [0.0, -0.0, 0.0, -0.0, -0.0, 0.0],
    "denormal": [SMALL, 0.0, 3 * SMALL, -SMALL, 2 * SMALL, 0.0],
    "largest": [3e38, -3e38, 3e38, 1.0, -3e38, 3e38],
    "sigmoids near 0": [-80.0, -60.0, -70.0, -50.0, -75.0, -65.0],
}
BIASES = {
    "no bias": None,
    "bias": [0.1, -0.2, 0.3, 0.05, -0.1, 0.2],
    "hidden experts": [0.1, -INF, -INF, -INF, -INF, 0.2],
    "NaN in the bias": [0.1, -0.2, NAN, 0.05, -0.1, 0.2],
}
ROUTING = [
    dict(scoring="softmax"),
    dict(scoring="sigmoid"),
    dict(scoring="sigmoid", norm_topk_prob=False),
    dict(scoring="softmax", norm_topk_prob=False, renormalize=False),
    dict(scoring="sigmoid", n_group=3, topk_group=2),
    dict(scoring="softmax", n_group=2, topk_group=2, group_best=2, routed_scaling_factor=2.5),
]


@both_backends
@pytest.mark.parametrize("options", ROUTING, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("bias", BIASES)
def test_routing(backend, options, bias):
    """Every row of LOGITS as a text and as a vision token, between ordinary ones, which keep their bits."""
    ordinary = routing.make_logits(3, 1, 6)
    rows = [row for odd in LOGITS.values() for row in (ordinary[0], torch.tensor(odd), torch.tensor(odd))]
    is_odd = torch.tensor([False, True, True]).repeat(len(LOGITS))
    vision = torch.tensor([True, True, False]).repeat(len(LOGITS))
    bias = None if BIASES[bias] is None else torch.tensor(BIASES[bias])
    case = routing.Case(torch.stack(rows), 4, vision, bias, options | dict(vision_top_k=2))
    routing.check(case, backend, ties=True)
    got = case.run(backend)
    for ids, is_vision in zip(got.ids.tolist(), vision.tolist(), strict=True):
        active = ids[: 2 if is_vision else 4]
        assert len(set(active)) == len(active) and set(active) <= set(range(6)) and set(ids[len(active) :]) <= {6}
    alone = replace(case, logits=ordinary, vision_mask=vision[:1]).run(backend)
    for have, want in zip(got[:2], alone[:2], strict=True):
        assert_same_bits(have[~is_odd], want.expand(len(LOGITS), -1))


@both_backends
@pytest.mark.parametrize("least", [0.25, 0.0, INF, -INF, NAN, SMALL])
@pytest.mark.parametrize("options", ROUTING, ids=lambda o: "-".join(map(str, o.values())))
def test_skipping(backend, options, least):
    """Every row of LOGITS: weights that are no numbers are kept, and so is everything where the least one is none."""
    logits = torch.tensor(list(LOGITS.values()))
    case = routing.Case(logits, 4, options=options, skip_below=torch.tensor([least, 0.0]))
    got, whole = case.run(backend), replace(case, skip_below=None).run(backend)
    shares = whole.weights / options.get("routed_scaling_factor", 1.0)
    is_skipped = shares < least
    assert_same_bits(got.ids, whole.ids.masked_fill(is_skipped, 6))
    assert_same_bits(got.weights, whole.weights.masked_fill(is_skipped, 0.0))


@both_backends
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gate(backend, scoring, dtype):
    """Tokens of NaN, of infinity, of zeros (all experts tie) and of the largest float16; a row of NaN in the weight."""
    case = routing.make_gate(5, 9, 6, 3, dtype, top_k=4, vision_mask=torch.arange(9) % 2 == 0,
                                  options=dict(scoring=scoring, vision_top_k=2))  # fmt: skip
    want = case.run(backend)
    for token, value in enumerate([NAN, INF, -INF]):
        case.hidden[token, 1] = value
    case.hidden[3] = 0.0
    case.hidden[4] = torch.tensor([65504.0, 0.0, 0.0])
    case.weight[:, 0] = torch.tensor([0.5, -1.0, 0.5, 2.0, 0.25, -2.0])  # exact products with the largest
    routing.check(replace(case, hidden=case.hidden[3:5], vision_mask=case.vision_mask[3:5]), backend, ties=True)
    odd = replace(case, hidden=case.hidden[:3], vision_mask=case.vision_mask[:3])
    routing.check(odd, backend, ties=True)
    got = replace(case, weight=routing.make_gate(5, 9, 6, 3, dtype, top_k=4).weight).run(backend)
    for have, expected in zip(got[:3], want[:3], strict=True):
        assert_same_bits(have[5:], expected[5:])
    case.weight[3] = NAN
    got = case.run(backend)
    assert (got.ids[:, 0] == (0 if scoring == "softmax" else 3))[3:].all() and got.weights[:, 0].isnan().all()


# --- attention: two samples, the first of which gets the odd values ---------------------------------------------------


def odd_attention(name):
    """query [2, 4, 8], key [2, 2, 20, 8], mask [2, 20], sinks [4]; what the first five keys hold is masked."""
    query, key = attention.make_inputs(7, 2, 4, 2, 20, 8)
    mask = torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
    mask[:, :5] = False
    sinks = attention.make_sinks(8, 4)
    if name in ("NaN key", "NaN key of one head"):
        key[0, 0, 9] = NAN
    if name == "NaN key of one head":
        mask = mask[:, None].repeat(1, 4, 1)
        mask[0, 1, 9] = False
        mask[0, 0, 12:14] = False
    if name == "inf in a key":
        key[0, :, 9, 3] = INF
    if name == "NaN query":
        query[0, 2] = NAN
    if name == "inf in the query":
        query[0, 2, 1] = -INF
    if name == "every score of a head is -inf":
        query[0, 2:], key[0, 1, :, 0] = torch.eye(8)[0], -INF
        key[0, 1, :, 1:] = 0.0
    if name == "one score is -inf":
        query[0, 2:], key[0, 1, 9] = torch.eye(8)[0], torch.tensor([-INF] + [0.0] * 7)
    if name == "all keys alike":
        key[0] = key[0, :, :1]
    if name == "zero query":
        query[0] = 0.0
    if name == "denormal":
        query[0] *= SMALL
    if name == "largest":
        query[0], key[0] = 0.0, 0.0
        query[0, :, 0], key[0, :, 11, 0] = 65504.0, 65504.0
    if name == "NaN sink":
        sinks[1] = NAN
    if name == "inf sink":
        sinks[1] = INF
    return query, key, mask, sinks


ATTENTION = [
    "NaN key", "NaN key of one head", "inf in a key", "NaN query", "inf in the query", "every score of a head is -inf",
    "one score is -inf", "all keys alike", "zero query", "denormal", "largest", "NaN sink", "inf sink",
]  # fmt: skip


@both_backends
@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(backend, has_sinks, name):
    query, key, mask, sinks = odd_attention(name)
    got = attention.check(query, key, backend, mask, sinks if has_sinks or "sink" in name else None)
    assert (got[:, :5] == 0).all()
    if "sink" not in name:
        sinks = sinks if has_sinks else None
        query, key, mask = query[1:], key[1:], mask[1:]
        alone = last_query_attention(query, key, scale=8**-0.5, key_mask=mask, sinks=sinks, backend=backend)
        assert_same_bits(got[1:], alone)


# --- windows and pruning: two samples, the first of which gets the odd values -----------------------------------------

SCORING = dict(window=3, alpha=0.5, strategy="hybrid")
STAGE = SCORING | dict(keep_ratio=0.5, merge_ratio=0.4)


def odd_batch(name):
    """Scores of few values, which no precision confuses, but for windows and tokens that tie."""
    batch = random_batch(4, [12, 12], 1.0, "left", experts=4)
    batch.probs[:] = torch.tensor([0.5, 0.25, 0.125, 0.125])
    batch.importance[:] = torch.arange(12) / 16
    if name.startswith("zero probs"):
        batch.probs[0, slice(6, 9) if name == "zero probs" else 7] = 0.0
    if name == "NaN in probs":
        batch.probs[0, 7, 2] = NAN
    if name == "inf in probs":
        batch.probs[0, 7, 2] = INF
    if name == "tiny probs":
        batch.probs[0] = 1e-12
    if name == "denormal probs":
        batch.probs[0] = SMALL
    if name == "NaN importance":
        batch.importance[0, 7] = NAN
    if name == "NaN importance of a sample":
        batch.importance[0] = NAN
    if name == "inf importance":
        batch.importance[0, 7] = INF
    if name == "zero importance":
        batch.importance[0] = 0.0
    if name == "denormal importance":
        batch.importance[0] *= SMALL
    if name == "negative importance":
        batch.importance[0] -= 1.0
    if name == "ties":
        batch.importance[0] = 0.25
    if name.startswith("NaN in hidden"):
        batch.hidden[0, 1::2, 4] = NAN
    if name == "inf in residual":
        batch.residual[0, 1::2, 4] = -INF
    if name == "zero vectors":
        batch.hidden[0] = 0.0
    if name == "some zero vectors":
        batch.hidden[0, ::3] = 0.0
    if name == "vectors that cancel":
        batch.hidden[0, 2::3], batch.hidden[0, 1::3] = 0.0, -batch.hidden[0, ::3]
    if name == "denormal vectors":
        batch.hidden[0] *= SMALL
    if name == "overflow of float16":  # the mean's direction is along one axis, the length is a diagonal's
        batch.hidden[0] = 0.0
        batch.hidden[0, :, 0], batch.hidden[0, ::3, 1], batch.hidden[0, 1::3, 1] = 6e4, 6e4, -6e4
        batch.hidden, batch.residual = batch.hidden.half().float(), batch.residual.half().float()
    return batch


SCORES = [
    "zero probs", "zero probs of one token", "NaN in probs", "inf in probs", "tiny probs", "denormal probs",
    "NaN importance", "NaN importance of a sample", "inf importance", "zero importance", "denormal importance",
    "negative importance", "ties",
]  # fmt: skip
VECTORS = [
    "NaN in hidden", "NaN in hidden, mean", "inf in residual", "zero vectors", "some zero vectors",
    "vectors that cancel", "denormal vectors", "overflow of float16",
]  # fmt: skip


@both_backends
@pytest.mark.parametrize("name", SCORES)
def test_windows(backend, name):
    redundancy.check(odd_batch(name), backend, **SCORING)


@cache
def ordinary_sample(backend, dtype, merge_method):
    """The second sample of every odd batch, pruned alone."""
    batch = odd_batch("").to(DEVICE, dtype)
    streams = [x[1:] for x in (batch.hidden, batch.residual, batch.probs, batch.importance)]
    layout = VisionLayout.from_mask(batch.vision[1:])
    return prune_batch(*streams, layout, **STAGE, merge_method=merge_method, backend=backend)


@both_backends
@pytest.mark.parametrize("name", [name for name in SCORES if "NaN" in name or "inf" in name] + ["ties", *VECTORS])
def test_prune(backend, name):
    merge_method = "mean" if name.endswith("mean") else "mlerp"
    batch, stage = odd_batch(name), STAGE | dict(merge_method=merge_method)
    dtype = torch.float16 if name == "overflow of float16" else torch.float32
    got = pruning.check(batch, backend, dtype, rtol=1e-3 if dtype == torch.float16 else 1e-5, **stage)
    assert got.merged[0].any()
    if name == "overflow of float16":
        assert got.hidden[0].isinf().any() and not got.hidden.isnan().any()
    for have, want in zip(got[:4], ordinary_sample(backend, dtype, merge_method)[:4], strict=True):
        assert_same_bits(have[1:], want)


# --- experts ----------------------------------------------------------------------------------------------------------

# token -> what becomes of its 24 features and two weights
TOKENS = {
    "NaN": lambda x, w: (x + NAN, w),
    "one inf": lambda x, w: (torch.cat((x[:3], torch.tensor([INF]), x[4:])), w),
    "one -inf": lambda x, w: (torch.cat((x[:3], torch.tensor([-INF]), x[4:])), w),
    "inf": lambda x, w: (x * INF, w),
    "zero": lambda x, w: (x * 0, w),
    "NaN weight": lambda x, w: (x, torch.tensor([NAN, 1.0])),
    "inf weight": lambda x, w: (x, torch.tensor([1.0, INF])),
    "zero weight of NaN": lambda x, w: (x + NAN, w * 0),
    "denormal": lambda x, w: (x * SMALL, w),
    "denormal in float16": lambda x, w: (x * 2.0**-24, w),
    "largest": lambda x, w: (x.sign() * 65504, w),
}


@both_backends
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float16, dict()), *((torch.float32, options) for options in experts.ACTIVATIONS)],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else str(v),
)
def test_experts(backend, dtype, options):
    """Every odd token between two ordinary ones, which keep their bits; the last expert of four is NaN and unused."""
    case = experts.make_case(2 * len(TOKENS), 4, 2, 24, 40, dtype=dtype, seed=6, **options)
    case.ids = torch.arange(case.ids.numel()).view(-1, 2) % 3
    case.gate_up_proj[3] = case.down_proj[3] = NAN
    ordinary = case.run(backend)
    case = replace(case, hidden=case.hidden.clone(), weights=case.weights.clone())
    for token, change in zip(range(0, len(case.hidden), 2), TOKENS.values(), strict=True):
        case.hidden[token], case.weights[token] = change(case.hidden[token].float(), case.weights[token])
    got, want = case.run(backend), experts.expected(case)
    assert ordinary.isfinite().all()
    assert_same_bits(got[1::2], ordinary[1::2])
    for name, have, expected in zip(TOKENS, got[::2], want[::2], strict=True):
        if name == "largest" and dtype == torch.float16:
            continue  # whether and where it overflows depends on what is rounded
        np.testing.assert_array_equal(have.isnan().numpy(), expected.isnan().numpy(), err_msg=name)
        infinite = expected.isinf()
        np.testing.assert_array_equal(have.isinf().numpy(), infinite.numpy(), err_msg=name)
        if expected.isfinite().all():
            bound = max(experts.BOUND[dtype] * expected.square().mean().sqrt().item(), 2.0**-22)
            np.testing.assert_allclose(have.double().numpy(), expected.numpy(), rtol=0, atol=bound, err_msg=name)
