"""Modality-dependent routing: torch backend and Triton against the float64 reference."""

from dataclasses import dataclass, field

import numpy as np
import oracle
import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmoe_kernels import topk_routing
from fastmmoe_kernels.routing import _topk_routing

BACKENDS = ("torch", "triton")
# closer scores than this may be told apart in float64 and not in float32
MARGIN = 3e-6


@dataclass
class Case:
    """Arguments of `topk_routing`."""

    logits: torch.Tensor
    top_k: int
    vision_mask: torch.Tensor | None = None
    correction_bias: torch.Tensor | None = None
    options: dict = field(default_factory=dict)

    def run(self, backend, **more):
        mask, bias = (None if t is None else t.to(DEVICE) for t in (self.vision_mask, self.correction_bias))
        return topk_routing(
            self.logits.to(DEVICE), self.top_k, vision_mask=mask, correction_bias=bias, backend=backend,
            **self.options, **more,
        )  # fmt: skip

    def expected(self) -> oracle.Routing:
        mask, bias = (None if t is None else t.double().numpy() for t in (self.vision_mask, self.correction_bias))
        logits = self.logits.double().numpy()
        return oracle.route(logits, self.top_k, vision_mask=mask, correction_bias=bias, **self.options)


def check(case, backend, *, ties=False):
    """Compare with the reference; with `ties`, equal scores are equal in float32 too and no token is left out."""
    got, want = case.run(backend, return_probs=True), case.expected()
    (num_tokens, num_experts), top_k = case.logits.shape, case.top_k
    assert got.ids.dtype == torch.int32 and got.ids.shape == (num_tokens, top_k)
    assert got.weights.dtype == torch.float32 and got.weights.shape == (num_tokens, top_k)
    assert got.probs.dtype == torch.float32 and got.probs.shape == (num_tokens, num_experts)
    np.testing.assert_allclose(got.probs.cpu().numpy(), want.probs, rtol=1e-5, atol=1e-30)
    gap = np.minimum(np.minimum(want.score_gap, want.group_gap), want.order_gap)
    clear = np.full(num_tokens, True) if ties else gap > MARGIN
    np.testing.assert_array_equal(got.ids.cpu().numpy()[clear], want.ids[clear])
    np.testing.assert_allclose(got.weights.cpu().numpy()[clear], want.weights[clear], rtol=1e-5, atol=1e-30)
    return clear


def make_logits(seed, num_tokens, num_experts, dtype=torch.float32):
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_mask(seed, num_tokens, share):
    return torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) < share


def strided(logits, how):
    """The same logits in another layout."""
    if how == "columns":
        return torch.stack((logits, torch.full_like(logits, torch.nan)), -1).flatten(1)[:, ::2]
    return logits.t().contiguous().t() if how == "transposed" else logits


@st.composite
def cases(draw):
    seed = draw(st.integers(0, 2**31))
    group_size, n_group = draw(st.sampled_from([(6, 1), (72, 1), (1, 6), (3, 4), (8, 8)]))
    num_experts = group_size * n_group
    topk_group = draw(st.integers(1, n_group))
    top_k = draw(st.integers(1, min(8, topk_group * group_size)))
    num_tokens = draw(st.sampled_from([0, 1, 2, 19]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    layout = draw(st.sampled_from(["contiguous", "columns", "transposed"]))
    case = Case(strided(make_logits(seed, num_tokens, num_experts, dtype), layout), top_k)
    case.options = dict(
        scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
        norm_topk_prob=draw(st.booleans()),
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        renormalize=draw(st.booleans()),
    )
    if draw(st.booleans()):
        case.correction_bias = make_logits(seed + 1, 1, num_experts)[0]
    if draw(st.booleans()):
        case.vision_mask = make_mask(seed + 2, num_tokens, draw(st.sampled_from([0.0, 0.5, 1.0])))
        case.options["vision_top_k"] = draw(st.integers(1, top_k))
    return case


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_equals_reference(backend, case):
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0], ids=["no-vision", "some-vision", "all-vision"])
@pytest.mark.parametrize("vision_top_k", [1, 2, 4], ids=lambda k: f"Kv={k}")
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalize", "as-is"])
@pytest.mark.parametrize("norm_topk_prob", [True, False], ids=["normalize", "raw"])
def test_vision_tokens(backend, share, vision_top_k, renormalize, norm_topk_prob):
    """T=63 is no multiple of a block; nearly all tokens must be compared."""
    options = dict(vision_top_k=vision_top_k, norm_topk_prob=norm_topk_prob, renormalize=renormalize)
    case = Case(make_logits(3, 63, 8), 4, make_mask(4, 63, share), options=options)
    assert check(case, backend).mean() > 0.95


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("num_experts", "top_k", "options", "with_bias"),
    [
        (128, 8, dict(vision_top_k=4), False),  # InternVL3.5-30B-A3B
        (64, 6, dict(vision_top_k=3, norm_topk_prob=False), False),  # DeepSeek-VL2 Small
        (72, 6, dict(vision_top_k=3, scoring="sigmoid", routed_scaling_factor=2.0), True),  # DeepSeek-VL2
        (256, 8, dict(vision_top_k=4, scoring="sigmoid", n_group=8, topk_group=4), True),  # group-limited, with bias
        (160, 6, dict(vision_top_k=3, n_group=8, topk_group=3, norm_topk_prob=False), False),  # and without
    ],
    ids=lambda v: f"{v}" if isinstance(v, int) else None,
)
def test_gates_of_models(backend, num_experts, top_k, options, with_bias):
    bias = 0.1 * make_logits(5, 1, num_experts)[0] if with_bias else None
    case = Case(make_logits(6, 33, num_experts), top_k, make_mask(7, 33, 0.8), bias, options)
    assert check(case, backend).mean() > 0.95


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("n_group", [1, 3])
def test_ties_go_to_the_lower_id(backend, scoring, n_group):
    """Few distinct logits: experts tie, at the edge of the selection too, and so do groups."""
    logits = torch.randint(0, 3, (50, 12), generator=torch.Generator().manual_seed(8)).float()
    options = dict(scoring=scoring, vision_top_k=2, n_group=n_group, topk_group=min(2, n_group))
    case = Case(logits, 5, make_mask(9, 50, 0.5), options=options)
    assert (case.expected().score_gap == 0).any() and (n_group == 1 or (case.expected().group_gap == 0).any())
    check(case, backend, ties=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_logits_equal(backend):
    case = Case(torch.zeros(3, 6), 4, torch.tensor([True, False, True]), options=dict(vision_top_k=2))
    out = case.run(backend)
    assert out.ids.tolist() == [[0, 1, 6, 6], [0, 1, 2, 3], [0, 1, 6, 6]]
    assert out.weights.tolist() == [[0.5, 0.5, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]]
    assert out.probs is None


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_extreme_logits(backend, scoring):
    """Hidden experts (-inf), overflowing exponentials, a token whose scores are all small."""
    logits = torch.tensor([[-1e4, 3.0, -torch.inf, 1e4, 2.0], [-40.0, -30.0, -35.0, -20.0, -25.0]])
    case = Case(logits, 2, torch.tensor([True, False]), options=dict(scoring=scoring, vision_top_k=1))
    got, want = case.run(backend), case.expected()
    np.testing.assert_array_equal(got.ids.cpu().numpy(), want.ids)
    np.testing.assert_allclose(got.weights.cpu().numpy(), want.weights, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    out = Case(torch.empty(0, 6), 2, torch.empty(0, dtype=torch.bool), options=dict(vision_top_k=1)).run(
        backend, return_probs=True
    )
    assert out.ids.shape == out.weights.shape == (0, 2) and out.probs.shape == (0, 6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_tokens_permutes_the_output_bitwise(backend):
    case = Case(make_logits(10, 40, 12), 4, make_mask(11, 40, 0.5), options=dict(vision_top_k=2))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(12))
    permuted = Case(case.logits[order], 4, case.vision_mask[order], options=case.options)
    for a, b in zip(case.run(backend, return_probs=True), permuted.run(backend, return_probs=True), strict=True):
        assert torch.equal(a[order.to(DEVICE)], b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bitwise(backend):
    case = Case(make_logits(13, 40, 72), 6, make_mask(14, 40, 0.5), options=dict(vision_top_k=3))
    for a, b in zip(case.run(backend, return_probs=True), case.run(backend, return_probs=True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("return_probs", [True, False], ids=["probs", "no-probs"])
def test_custom_op(backend, with_bias, return_probs):
    logits, mask = make_logits(15, 9, 6).to(DEVICE), make_mask(16, 9, 0.5).to(DEVICE)
    bias = make_logits(17, 1, 6)[0].to(DEVICE) if with_bias else None
    arguments = (logits, mask, bias, 3, 2, "softmax", True, 2, 1, 1.5, True, return_probs, backend)
    torch.library.opcheck(_topk_routing, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend):
    def route(logits, mask):
        out = topk_routing(logits, 3, vision_mask=mask, vision_top_k=2, return_probs=True, backend=backend)
        return out.ids, out.weights, out.probs

    inputs = make_logits(18, 9, 6).to(DEVICE), make_mask(19, 9, 0.5).to(DEVICE)
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*inputs), route(*inputs), strict=True):
        assert torch.equal(a, b)


GOOD = dict(logits=torch.zeros(5, 6), top_k=2)
MASK = torch.zeros(5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("wrong", "error", "name"),
    [
        (dict(logits=[[1.0]]), TypeError, "logits"),
        (dict(logits=torch.zeros(5)), ValueError, "logits"),
        (dict(logits=torch.zeros(5, 6, dtype=torch.float64)), TypeError, "logits"),
        (dict(top_k=0), ValueError, "top_k"),
        (dict(top_k=7), ValueError, "top_k"),
        (dict(top_k=2.0), TypeError, "top_k"),
        (dict(top_k=True), TypeError, "top_k"),
        (dict(vision_mask=MASK.float()), TypeError, "vision_mask"),
        (dict(vision_mask=MASK[:4]), ValueError, "vision_mask"),
        (dict(vision_mask=MASK.to("meta")), ValueError, "vision_mask"),
        (dict(vision_mask=MASK, vision_top_k=3), ValueError, "vision_top_k"),
        (dict(vision_mask=MASK, vision_top_k=0), ValueError, "vision_top_k"),
        (dict(vision_top_k=1), ValueError, "vision_mask"),
        (dict(scoring="relu"), ValueError, "scoring"),
        (dict(correction_bias=torch.zeros(5)), ValueError, "correction_bias"),
        (dict(correction_bias=torch.zeros(6, dtype=torch.int32)), TypeError, "correction_bias"),
        (dict(n_group=4), ValueError, "n_group"),
        (dict(n_group=0), ValueError, "n_group"),
        (dict(n_group=3, topk_group=4), ValueError, "topk_group"),
        (dict(n_group=6, topk_group=1), ValueError, "topk_group"),
        (dict(routed_scaling_factor=0.0), ValueError, "routed_scaling_factor"),
        (dict(routed_scaling_factor=float("nan")), ValueError, "routed_scaling_factor"),
        (dict(routed_scaling_factor="2"), TypeError, "routed_scaling_factor"),
        (dict(backend="cuda"), ValueError, "backend"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else None,
)
def test_bad_input_names_the_argument(wrong, error, name):
    arguments = {key: value.to(DEVICE) if value is MASK else value for key, value in (GOOD | wrong).items()}
    if "logits" not in wrong:
        arguments["logits"] = GOOD["logits"].to(DEVICE)
    with pytest.raises(error, match=f"^{name}"):
        topk_routing(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [4096, 16384 + 7])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "options", "with_bias"),
    [
        (128, 8, dict(vision_top_k=4), False),
        (64, 6, dict(vision_top_k=3, norm_topk_prob=False), False),
        (72, 6, dict(vision_top_k=3, scoring="sigmoid", routed_scaling_factor=2.0), True),
    ],
    ids=["internvl3.5", "deepseek-vl2-small", "deepseek-vl2"],
)
def test_real_sizes(dtype, num_tokens, num_experts, top_k, options, with_bias):
    bias = 0.1 * make_logits(20, 1, num_experts)[0] if with_bias else None
    case = Case(make_logits(21, num_tokens, num_experts, dtype), top_k, make_mask(22, num_tokens, 0.9), bias, options)
    # 16-bit logits repeat within a row: exact ties, which the margin leaves out
    assert check(case, "triton").mean() > (0.95 if dtype == torch.float32 else 0.8)


@pytest.mark.gpu
def test_runs_in_a_cuda_graph():
    case = Case(make_logits(23, 1000, 128), 8, make_mask(24, 1000, 0.9), options=dict(vision_top_k=4))
    logits, mask = case.logits.to(DEVICE), case.vision_mask.to(DEVICE)
    expected = topk_routing(logits, 8, vision_mask=mask, vision_top_k=4, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = topk_routing(logits, 8, vision_mask=mask, vision_top_k=4, backend="triton")
    graph.replay()
    assert torch.equal(out.ids, expected.ids) and torch.equal(out.weights, expected.weights)
