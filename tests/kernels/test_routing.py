"""Modality-dependent routing, from logits and from the gate's input: both backends against the float64 reference."""

from dataclasses import dataclass, field, replace

import numpy as np
import oracle
import pytest
import torch
from conftest import DEVICE, HAS_GPU
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmoe_kernels import gate_routing, topk_routing
from fastmmoe_kernels.routing import _gate_routing, _topk_routing

BACKENDS = ("torch", "triton")
# closer scores than this may be told apart in float64 and not in float32
MARGIN = 3e-6
# how far a gate's logits, of unit scale, may be from float64 ones: on tensor cores as well, with H of thousands
LOGIT_ERROR = 5e-5 if HAS_GPU else 2e-6


TENSORS = ("vision_mask", "padding_mask", "skip_below", "exempt_mask", "vision_experts", "correction_bias")


@dataclass
class Case:
    """Arguments of `topk_routing`."""

    logits: torch.Tensor | None
    top_k: int
    vision_mask: torch.Tensor | None = None
    correction_bias: torch.Tensor | None = None
    options: dict = field(default_factory=dict)
    padding_mask: torch.Tensor | None = None
    skip_below: torch.Tensor | None = None
    exempt_mask: torch.Tensor | None = None
    vision_experts: torch.Tensor | None = None

    def run(self, backend, **more):
        tensors = {key: None if t is None else t.to(DEVICE) for key, t in self.tensors().items()}
        return self.op(backend, top_k=self.top_k, **tensors, **self.options, **more)

    def op(self, backend, **arguments):
        return topk_routing(self.logits.to(DEVICE), backend=backend, **arguments)

    def expected(self) -> oracle.Routing:
        tensors = {key: None if t is None else t.double().numpy() for key, t in self.tensors().items()}
        return oracle.route(self.expected_logits(), self.top_k, **tensors, **self.options)

    def expected_logits(self):
        return self.logits.double().numpy()

    def tensors(self):
        return {name: getattr(self, name) for name in TENSORS}


@dataclass
class GateCase(Case):
    """Arguments of `gate_routing`: instead of the logits, what they come from."""

    hidden: torch.Tensor = None
    weight: torch.Tensor = None
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0

    def op(self, backend, **arguments):
        bias = None if self.bias is None else self.bias.to(DEVICE)
        arguments |= dict(bias=bias, logit_scale=self.logit_scale, backend=backend)
        return gate_routing(self.hidden.to(DEVICE), self.weight.to(DEVICE), **arguments)

    def expected_logits(self):
        bias = None if self.bias is None else self.bias.double().numpy()
        hidden, weight = self.hidden.double().numpy(), self.weight.double().numpy()
        return oracle.gate_logits(hidden, weight, bias=bias, logit_scale=self.logit_scale)


def check(case, backend, *, ties=False):
    """Compare with the reference; with `ties`, equal scores are equal in float32 too and no token is left out."""
    got, want = case.run(backend, return_probs=True), case.expected()
    (num_tokens, num_experts), top_k = want.probs.shape, case.top_k
    error = 0.0
    if isinstance(case, GateCase):
        assert got.logits.dtype == torch.float32 and got.logits.shape == (num_tokens, num_experts)
        error = 0.0 if ties else LOGIT_ERROR
        np.testing.assert_allclose(got.logits.cpu().numpy(), case.expected_logits(), rtol=0, atol=error)
    assert got.ids.dtype == torch.int32 and got.ids.shape == (num_tokens, top_k)
    assert got.weights.dtype == torch.float32 and got.weights.shape == (num_tokens, top_k)
    assert got.probs.dtype == torch.float32 and got.probs.shape == (num_tokens, num_experts)
    # p changes by a factor of at most 1 + 2 error, and so does a sum of p, by which a weight is divided
    rtol = 1e-5 + 4 * error
    np.testing.assert_allclose(got.probs.cpu().numpy(), want.probs, rtol=rtol, atol=1e-30)
    gap = np.minimum(np.minimum(want.score_gap, want.group_gap), want.order_gap)
    # p changes by at most error / 2, and two of them are compared, or two sums of two
    clear = (ties | (gap > MARGIN + 2 * error)) & (want.skip_gap > rtol)
    np.testing.assert_array_equal(got.ids.cpu().numpy()[clear], want.ids[clear])
    np.testing.assert_allclose(got.weights.cpu().numpy()[clear], want.weights[clear], rtol=rtol, atol=1e-30)
    return clear


def make_gate(seed, num_tokens, num_experts, width, dtype=torch.float32, **fields):
    """Tokens and weights whose logits are at unit scale."""
    hidden = make_logits(seed, num_tokens, width, dtype)
    weight = (make_logits(seed + 1, num_experts, width) / width**0.5).to(dtype)
    return GateCase(None, hidden=hidden, weight=weight, **fields)


def make_logits(seed, num_tokens, num_experts, dtype=torch.float32):
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_mask(seed, num_tokens, share):
    return torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) < share


def strided(logits, how):
    """The same matrix in another layout."""
    if how == "rows":
        return torch.cat((logits, torch.full_like(logits[:, :1], torch.nan)), 1)[:, :-1]
    if how == "columns":
        return torch.stack((logits, torch.full_like(logits, torch.nan)), -1).flatten(1)[:, ::2]
    return logits.t().contiguous().t() if how == "transposed" else logits


# least weights: of nothing, of about half of the experts, of all
LEAST = st.sampled_from([0.0, 0.1, 0.25, 0.5, float("inf")])


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
        group_best=draw(st.sampled_from([None, 1] if group_size == 1 else [None, 1, 2])),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        renormalize=draw(st.booleans()),
    )
    if draw(st.booleans()):
        case.correction_bias = make_logits(seed + 1, 1, num_experts)[0]
    if draw(st.booleans()):
        case.vision_mask = make_mask(seed + 2, num_tokens, draw(st.sampled_from([0.0, 0.5, 1.0])))
        case.options["vision_top_k"] = draw(st.integers(1, top_k))
        if n_group == 1 and draw(st.booleans()):
            case.vision_experts = make_mask(seed + 5, num_experts, draw(st.sampled_from([0.0, 0.2, 0.7, 1.0])))
    if draw(st.booleans()):
        case.padding_mask = make_mask(seed + 3, num_tokens, draw(st.sampled_from([0.0, 0.5, 1.0])))
    if draw(st.booleans()):
        case.skip_below = torch.tensor(draw(st.tuples(LEAST, LEAST)))
        if draw(st.booleans()):
            case.exempt_mask = make_mask(seed + 4, num_tokens, draw(st.sampled_from([0.0, 0.5, 1.0])))
    return case


@st.composite
def gate_cases(draw, dtypes):
    """The cases above, their logits replaced; 70 tokens are more than one program of the gate's kernel."""
    case, seed = draw(cases()), draw(st.integers(0, 2**31))
    num_tokens, num_experts = case.logits.shape
    if num_tokens == 19 and draw(st.booleans()):
        num_tokens = 70
        for name in ("vision_mask", "padding_mask", "exempt_mask"):
            if getattr(case, name) is not None:
                setattr(case, name, getattr(case, name).repeat(4)[:70])
    # 64 is one block of the sum; 96 one and a half for 16-bit types and three for float32
    width, dtype = draw(st.sampled_from([1, 7, 64, 96])), draw(st.sampled_from(dtypes))
    gate = make_gate(seed, num_tokens, num_experts, width, dtype, top_k=case.top_k, options=case.options,
                     logit_scale=draw(st.sampled_from([1.0, 0.25])), **case.tensors())  # fmt: skip
    bias_dtype = draw(st.sampled_from([None, torch.float32, torch.float16, torch.bfloat16]))
    gate.bias = None if bias_dtype is None else make_logits(seed + 2, 1, num_experts, bias_dtype)[0]
    layout = draw(st.sampled_from(["contiguous", "rows", "columns", "transposed"]))
    return replace(gate, hidden=strided(gate.hidden, layout), weight=strided(gate.weight, layout))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_equals_reference(backend, case):
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_gate_equals_reference(backend, data):
    # the interpreter cannot multiply bfloat16
    bfloat16 = () if backend == "triton" and not HAS_GPU else (torch.bfloat16,)
    check(data.draw(gate_cases([torch.float32, torch.float16, *bfloat16])), backend)


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
@pytest.mark.parametrize("vision_top_k", [2, 4], ids=lambda k: f"Kv={k}")
@pytest.mark.parametrize("norm_topk_prob", [True, False], ids=["normalize", "raw"])
@pytest.mark.parametrize("masks", [(), ("vision_mask",), ("vision_mask", "exempt_mask", "padding_mask")], ids="+".join)
def test_light_experts_are_skipped(backend, vision_top_k, norm_topk_prob, masks):
    """About half of them, by thresholds of their own for text and vision; what is kept keeps its bits."""
    given = {name: make_mask(43 + number, 70, 0.5) for number, name in enumerate(masks)}
    options = dict(norm_topk_prob=norm_topk_prob, routed_scaling_factor=2.5)
    case = make_gate(46, 70, 8, 12, top_k=4, **given, options=options)
    if "vision_mask" in masks:
        case.options["vision_top_k"] = vision_top_k
    case.skip_below = torch.tensor([0.2, 0.3] if norm_topk_prob else [0.15, 0.35])
    check(case, backend)
    got, whole = case.run(backend), replace(case, skip_below=None, exempt_mask=None).run(backend)
    is_kept = got.ids < 8
    assert 0.2 < is_kept.sum() / (whole.ids < 8).sum() < 0.95
    assert torch.equal(got.ids[is_kept], whole.ids[is_kept]) and (got.weights[~is_kept] == 0).all()
    assert torch.equal(got.weights[is_kept], whole.weights[is_kept])


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice) encountered")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm_topk_prob", [True, False], ids=["normalize", "raw"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0], ids=["no-padding", "some-padding", "all-padding"])
def test_padding_activates_no_expert(backend, share, norm_topk_prob):
    """Padding is text or vision, and may hold NaN, which reaches nobody."""
    case = make_gate(25, 70, 8, 12, top_k=4, vision_mask=make_mask(26, 70, 0.5), padding_mask=make_mask(27, 70, share),
                     options=dict(vision_top_k=2, norm_topk_prob=norm_topk_prob))  # fmt: skip
    want, padding = case.expected(), case.padding_mask.numpy()
    assert (want.ids[padding] == 8).all() and (want.weights[padding] == 0).all()
    assert (want.ids[~padding, 0] < 8).all()
    check(case, backend)
    poisoned = replace(case, hidden=case.hidden.masked_fill(case.padding_mask.unsqueeze(1), torch.nan))
    gate = poisoned.run(backend)
    logits = Case(gate.logits, 4, case.vision_mask, options=case.options, padding_mask=case.padding_mask)
    for got in (gate, logits.run(backend)):
        np.testing.assert_array_equal(got.ids.cpu().numpy(), want.ids)
        np.testing.assert_allclose(got.weights.cpu().numpy(), want.weights, rtol=1e-5 + 4 * LOGIT_ERROR)


MODELS = [
    (128, 8, dict(vision_top_k=4), False),  # InternVL3.5-30B-A3B
    (64, 6, dict(vision_top_k=3, norm_topk_prob=False), False),  # DeepSeek-VL2 Small
    (72, 6, dict(vision_top_k=3, scoring="sigmoid", routed_scaling_factor=2.0), True),  # DeepSeek-VL2
    (256, 8, dict(vision_top_k=4, scoring="sigmoid", n_group=8, topk_group=4), True),  # group-limited, with bias
    (160, 6, dict(vision_top_k=3, n_group=8, topk_group=3, norm_topk_prob=False), False),  # and without
    (128, 4, dict(vision_top_k=2, n_group=8, topk_group=3, group_best=2), False),  # two scores per group, as Mistral-4
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("num_experts", "top_k", "options", "with_bias"), MODELS, ids=lambda v: f"{v}" if isinstance(v, int) else None
)
def test_gates_of_models(backend, num_experts, top_k, options, with_bias):
    bias = 0.1 * make_logits(5, 1, num_experts)[0] if with_bias else None
    case = Case(make_logits(6, 33, num_experts), top_k, make_mask(7, 33, 0.8), bias, options)
    assert check(case, backend).mean() > 0.95
    gate = make_gate(6, 33, num_experts, 80, torch.float16, top_k=top_k, options=options, **case.tensors())
    assert check(gate, backend).mean() > 0.85


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("n_group", [1, 3])
def test_ties_of_the_gate_go_to_the_lower_id(backend, dtype, scoring, n_group):
    """Integers add up to the same logits in any order: they are compared bit by bit, and all tokens are."""
    rng = torch.Generator().manual_seed(28)
    hidden = torch.zeros(70, 96)
    hidden[:, ::24] = torch.randint(-1, 2, (70, 4), generator=rng).float()
    weight = torch.randint(-1, 2, (12, 96), generator=rng).float()
    options = dict(scoring=scoring, vision_top_k=2, n_group=n_group, topk_group=min(2, n_group))
    case = GateCase(None, 4, make_mask(29, 70, 0.5), options=options, padding_mask=make_mask(30, 70, 0.1),
                    hidden=hidden.to(dtype), weight=weight.to(dtype))  # fmt: skip
    assert (case.expected().score_gap == 0).any() and (n_group == 1 or (case.expected().group_gap == 0).any())
    check(case, backend, ties=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gate_does_not_round_logits(backend, dtype):
    """Experts whose logits differ by less than a 16-bit type resolves, at 256: the higher wins, under autocast too."""
    if backend == "triton" and not HAS_GPU and dtype == torch.bfloat16:
        pytest.skip("the interpreter cannot multiply bfloat16")
    weight = torch.ones(4, 257)
    weight[:, 256] = torch.tensor([0.0, 0.0625, 0.03125, 0.015625])
    case = GateCase(None, 2, hidden=torch.ones(3, 257, dtype=dtype), weight=weight.to(dtype))
    with torch.autocast(DEVICE.type, dtype):
        got = case.run(backend)
    assert got.logits.tolist() == [[256.0, 256.0625, 256.03125, 256.015625]] * 3
    assert got.ids.tolist() == [[1, 2]] * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "group_best, with_bias, want", [(None, False, 0), (None, True, 1), (1, True, 0), (2, False, 1)]
)
def test_groups_count_as_many_as_told(backend, group_best, with_bias, want):
    """Group 0 has the best expert, group 1 the best two."""
    logits = torch.tensor([[3.0, 0.0, 2.9, 2.8]]).to(DEVICE)
    options = dict(n_group=2, topk_group=1, group_best=group_best, backend=backend)
    bias = torch.zeros(4, device=DEVICE) if with_bias else None
    out = topk_routing(logits, 2, correction_bias=bias, **options)
    assert out.ids.tolist() == [[2 * want, 2 * want + 1]]
    out = gate_routing(torch.ones(1, 1, device=DEVICE), logits.T.contiguous(), 2, correction_bias=bias, **options)
    assert out.ids.tolist() == [[2 * want, 2 * want + 1]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate_bias_and_scale(backend, dtype):
    """The bias counts, the scale multiplies it too, and both are in the logits that come back, unrounded."""
    x, weight = torch.ones(2, 1), torch.tensor([[1.0], [2.0], [3.0]])
    bias = torch.tensor([4.0, 0.0, -1.0], dtype=dtype)
    out = GateCase(None, 2, hidden=x, weight=weight, bias=bias, logit_scale=2.5).run(backend, return_probs=True)
    assert out.logits.tolist() == [[12.5, 5.0, 5.0]] * 2 and out.ids.tolist() == [[0, 1]] * 2
    torch.testing.assert_close(out.probs.cpu(), torch.tensor([[12.5, 5.0, 5.0]] * 2).softmax(-1))


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
    out = gate_routing(torch.empty(0, 5, device=DEVICE), torch.ones(6, 5, device=DEVICE), 2, backend=backend)
    assert out.ids.shape == out.weights.shape == (0, 2) and out.logits.shape == (0, 6) and out.probs is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_tokens_permutes_the_output_bitwise(backend):
    case = Case(make_logits(10, 40, 12), 4, make_mask(11, 40, 0.5), options=dict(vision_top_k=2))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(12))
    permuted = Case(case.logits[order], 4, case.vision_mask[order], options=case.options)
    for a, b in zip(case.run(backend, return_probs=True), permuted.run(backend, return_probs=True), strict=True):
        assert torch.equal(a[order.to(DEVICE)], b)


def test_permuting_tokens_permutes_the_output_of_the_gate_kernel_bitwise():
    """Of eighths, whose products no order of adding rounds: the interpreter's are NumPy's, which depends on the CPU.

    The torch backend's matrix product promises no such thing.
    """
    case = make_gate(31, 70, 12, 48, top_k=4, vision_mask=make_mask(32, 70, 0.5), options=dict(vision_top_k=2))
    case = replace(case, hidden=(8 * case.hidden).round() / 8, weight=(8 * case.weight).round() / 8)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(33))
    permuted = replace(case, hidden=case.hidden[order], vision_mask=case.vision_mask[order])
    for a, b in zip(case.run("triton", return_probs=True), permuted.run("triton", return_probs=True), strict=True):
        assert torch.equal(a[order.to(DEVICE)], b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bitwise(backend):
    case = Case(make_logits(13, 40, 72), 6, make_mask(14, 40, 0.5), options=dict(vision_top_k=3))
    gate = make_gate(13, 40, 72, 48, top_k=6, options=case.options, **case.tensors())
    for op in (case, gate):
        for a, b in zip(op.run(backend, return_probs=True), op.run(backend, return_probs=True), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("return_probs", [True, False], ids=["probs", "no-probs"])
@pytest.mark.parametrize("with_padding", [True, False], ids=["padding", "no-padding"])
def test_custom_op(backend, with_bias, return_probs, with_padding):
    logits, mask = make_logits(15, 9, 6).to(DEVICE), make_mask(16, 9, 0.5).to(DEVICE)
    padding = make_mask(34, 9, 0.5).to(DEVICE) if with_padding else None
    bias = make_logits(17, 1, 6)[0].to(DEVICE) if with_bias else None
    group_best = 1 if with_padding else None
    skip = (torch.tensor([0.1, 0.3]).to(DEVICE), padding) if return_probs else (None, None)
    allowed = make_mask(36, 6, 0.5).to(DEVICE) if with_bias and return_probs else None
    n_group = 1 if allowed is not None else 2
    masks = (mask, padding, *skip, allowed, bias)
    arguments = (*masks, 3, 2, "softmax", True, n_group, 1, group_best, 1.5, True, return_probs, backend)
    torch.library.opcheck(_topk_routing, (logits, *arguments))
    hidden, weight = make_logits(35, 9, 5).to(DEVICE), make_logits(36, 6, 5).to(DEVICE)
    torch.library.opcheck(_gate_routing, (hidden, weight, bias, 0.5, *arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend):
    def route(logits, mask):
        options = dict(vision_mask=mask, vision_top_k=2, padding_mask=~mask, return_probs=True, backend=backend)
        options |= dict(skip_below=logits[0, :2].abs(), exempt_mask=mask)
        gate = gate_routing(logits, logits, 3, bias=logits[:, 0], logit_scale=0.5, **options)
        return *topk_routing(logits, 3, n_group=2, topk_group=2, group_best=2, **options), *gate

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
        (dict(padding_mask=MASK.float()), TypeError, "padding_mask"),
        (dict(padding_mask=MASK[:4]), ValueError, "padding_mask"),
        (dict(padding_mask=MASK.to("meta")), ValueError, "padding_mask"),
        (dict(skip_below=0.1), TypeError, "skip_below"),
        (dict(skip_below=torch.zeros(3)), ValueError, "skip_below"),
        (dict(skip_below=torch.zeros(2, dtype=torch.float64)), TypeError, "skip_below"),
        (dict(skip_below=torch.zeros(2, device="meta")), ValueError, "skip_below"),
        (dict(exempt_mask=MASK), ValueError, "exempt_mask"),
        (dict(vision_experts=torch.ones(6, dtype=torch.bool)), ValueError, "vision_mask"),
        (dict(vision_mask=MASK, vision_experts=MASK), ValueError, "vision_experts"),
        (dict(vision_mask=MASK, vision_experts=torch.ones(6)), TypeError, "vision_experts"),
        (dict(vision_mask=MASK, vision_experts=torch.ones(6) > 0, n_group=2, topk_group=2), ValueError,
         "vision_experts"),
        (dict(exempt_mask=MASK[:4], skip_below=torch.zeros(2)), ValueError, "exempt_mask"),
        (dict(exempt_mask=MASK.float(), skip_below=torch.zeros(2)), TypeError, "exempt_mask"),
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
        (dict(n_group=3, group_best=0), ValueError, "group_best"),
        (dict(n_group=2, group_best=3), ValueError, "group_best"),
        (dict(n_group=6, topk_group=2, group_best=2), ValueError, "group_best"),
        (dict(n_group=3, group_best=1.0), TypeError, "group_best"),
        (dict(n_group=0, group_best=1), ValueError, "n_group"),
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


@pytest.mark.parametrize(
    ("wrong", "error", "name"),
    [
        (dict(hidden=[[1.0]]), TypeError, "hidden"),
        (dict(hidden=torch.zeros(5)), ValueError, "hidden"),
        (dict(hidden=torch.zeros(5, 4, dtype=torch.float64)), TypeError, "hidden"),
        (dict(weight=None), TypeError, "weight"),
        (dict(weight=torch.zeros(6, 3)), ValueError, "weight"),
        (dict(weight=torch.zeros(6, 4, dtype=torch.float16)), TypeError, "weight"),
        (dict(weight=torch.zeros(6, 4, device="meta")), ValueError, "weight"),
        (dict(bias=torch.zeros(5)), ValueError, "bias"),
        (dict(bias=torch.zeros(6, dtype=torch.int32)), TypeError, "bias"),
        (dict(bias=torch.zeros(6, device="meta")), ValueError, "bias"),
        (dict(logit_scale=0.0), ValueError, "logit_scale"),
        (dict(logit_scale=float("inf")), ValueError, "logit_scale"),
        (dict(logit_scale="1"), TypeError, "logit_scale"),
        (dict(n_group=3, group_best=3), ValueError, "group_best"),
        (dict(top_k=7), ValueError, "top_k"),
        (dict(padding_mask=MASK[:4]), ValueError, "padding_mask"),
        (dict(vision_top_k=1), ValueError, "vision_mask"),
        (dict(skip_below=torch.zeros(1)), ValueError, "skip_below"),
        (dict(n_group=4), ValueError, "n_group"),
        (dict(backend="cuda"), ValueError, "backend"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else None,
)
def test_bad_input_of_the_gate_names_the_argument(wrong, error, name):
    good = dict(hidden=torch.zeros(5, 4), weight=torch.zeros(6, 4), top_k=2)
    with pytest.raises(error, match=f"^{name}"):
        gate_routing(**(good | wrong))


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_experts", "top_k", "options", "with_bias"), MODELS)
def test_gate_of_real_sizes(dtype, num_experts, top_k, options, with_bias):
    case = make_gate(37, 4103, num_experts, 2048, dtype, top_k=top_k, vision_mask=make_mask(38, 4103, 0.9),
                     padding_mask=make_mask(39, 4103, 0.1), options=options)  # fmt: skip
    case.correction_bias = 0.1 * make_logits(40, 1, num_experts)[0] if with_bias else None
    assert check(case, "triton").mean() > 0.8


@pytest.mark.gpu
def test_gate_runs_in_a_cuda_graph():
    case = make_gate(41, 1000, 128, 2048, torch.bfloat16, top_k=8)
    hidden, weight, mask = case.hidden.to(DEVICE), case.weight.to(DEVICE), make_mask(42, 1000, 0.9).to(DEVICE)
    options = dict(vision_mask=mask, vision_top_k=4, padding_mask=~mask, return_probs=True, backend="triton")
    expected = gate_routing(hidden, weight, 8, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gate_routing(hidden, weight, 8, **options)
    graph.replay()
    for a, b in zip(out, expected, strict=True):
        assert torch.equal(a, b)


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
