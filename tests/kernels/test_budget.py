"""The expert budget: both backends against the float64 reference."""

import numpy as np
import oracle
import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmoe_kernels import choose_experts, topk_routing
from fastmmoe_kernels.budget import _choose_experts

from .test_routing import make_logits, make_mask

BACKENDS = ("torch", "triton")
both_backends = pytest.mark.parametrize("backend", BACKENDS)
NAN, INF = float("nan"), float("inf")


def make_choice(seed, num_tokens, num_experts, top_k, dtype=torch.float32):
    """What a softmax gate chooses of random logits, with probabilities for weights."""
    routing = topk_routing(make_logits(seed, num_tokens, num_experts), top_k, norm_topk_prob=False, backend="torch")
    return routing.ids, routing.weights.to(dtype)


def run(ids, weights, mask, backend, **options):
    tensors = (tensor.to(DEVICE) for tensor in (ids, weights, mask))
    return choose_experts(*tensors, backend=backend, **options).cpu()


def check(ids, weights, mask, backend, **options):
    """Compare with the reference where no two demands are closer than float32 can tell."""
    want = oracle.choose_experts(ids.numpy(), weights.double().numpy(), mask.numpy(), **options)
    got = run(ids, weights, mask, backend, **options)
    assert got.dtype == torch.bool and got.shape == (options["num_experts"],) and got.sum() == options["budget"]
    if want.gap > 1e-4:
        np.testing.assert_array_equal(got.numpy(), want.chosen)
    return want


@both_backends
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_equals_reference(backend, data):
    num_experts = data.draw(st.sampled_from([1, 6, 33, 72]))
    top_k, num_tokens = data.draw(st.integers(1, min(8, num_experts))), data.draw(st.sampled_from([1, 2, 19, 300, 600]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    ids, weights = make_choice(data.draw(st.integers(0, 2**31)), num_tokens, num_experts, top_k, dtype)
    mask = make_mask(data.draw(st.integers(0, 2**31)), num_tokens, data.draw(st.sampled_from([0.0, 0.5, 1.0])))
    if data.draw(st.booleans()):  # of tokens that choose none
        ids[data.draw(st.integers(0, num_tokens - 1))] = data.draw(st.sampled_from([-1, num_experts]))
    if data.draw(st.booleans()):
        ids = ids.long()
    check(ids, weights, mask, backend, num_experts=num_experts, budget=data.draw(st.integers(1, num_experts)))


@both_backends
def test_whom_one_token_needs_much_goes_before_whom_many_need_little(backend):
    """0.5^8 is more than 100 times 0.25^8, and ties go to the lower id."""
    ids = torch.tensor([[1]] * 100 + [[4]] + [[0], [3]], dtype=torch.int32)
    weights = torch.tensor([[0.25]] * 100 + [[0.5]] + [[0.125]] * 2)
    mask = torch.ones(103, dtype=torch.bool)
    for budget, want in enumerate(([4], [1, 4], [0, 1, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]), 1):
        got = run(ids, weights, mask, backend, num_experts=6, budget=budget)
        assert got.nonzero().flatten().tolist() == want


@both_backends
def test_tokens_outside_of_the_mask_do_not_count(backend):
    ids, weights = make_choice(3, 50, 12, 4)
    mask = make_mask(4, 50, 0.5)
    want = check(ids, weights, mask, backend, num_experts=12, budget=5).chosen
    poisoned = weights.masked_fill(~mask.unsqueeze(1), NAN)
    np.testing.assert_array_equal(run(ids, poisoned, mask, backend, num_experts=12, budget=5).numpy(), want)


@both_backends
@pytest.mark.parametrize("value", [NAN, INF])
def test_no_numbers_are_the_largest(backend, value):
    ids, weights = make_choice(5, 20, 12, 4)
    mask = torch.ones(20, dtype=torch.bool)
    least = int((~run(ids, weights, mask, backend, num_experts=12, budget=11)).nonzero())
    token, slot = (ids == least).nonzero()[0].tolist() if (ids == least).any() else (0, 0)
    ids[token, slot] = least
    weights[token, slot] = value
    assert run(ids, weights, mask, backend, num_experts=12, budget=1)[least]


@both_backends
def test_no_tokens(backend):
    ids, weights, mask = torch.empty(0, 3, dtype=torch.int32), torch.empty(0, 3), torch.empty(0, dtype=torch.bool)
    assert run(ids, weights, mask, backend, num_experts=5, budget=2).tolist() == [True, True, False, False, False]


@both_backends
def test_repeats_bitwise_and_does_not_depend_on_layout(backend):
    ids, weights = make_choice(6, 700, 40, 5)
    mask = make_mask(7, 700, 0.7)
    want = run(ids, weights, mask, backend, num_experts=40, budget=11)
    spread = torch.stack((ids, ids), -1)[..., 0], torch.stack((weights, weights), -1)[..., 0]
    assert torch.equal(run(*spread, mask, backend, num_experts=40, budget=11), want)
    assert torch.equal(run(ids, weights, mask, backend, num_experts=40, budget=11), want)


@both_backends
def test_custom_op(backend):
    ids, weights = make_choice(8, 9, 6, 3)
    arguments = (ids.to(DEVICE), weights.to(DEVICE), make_mask(9, 9, 0.5).to(DEVICE), 6, 2, backend)
    torch.library.opcheck(_choose_experts, arguments)


GOOD = dict(
    ids=torch.zeros(5, 2, dtype=torch.int32), weights=torch.zeros(5, 2), vision_mask=torch.ones(5, dtype=torch.bool),
    num_experts=6, budget=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (dict(ids=torch.zeros(5, 2)), TypeError),
        (dict(ids=torch.zeros(5, dtype=torch.int32)), ValueError),
        (dict(weights=torch.zeros(5, 3)), ValueError),
        (dict(weights=torch.zeros(5, 2, dtype=torch.int32)), TypeError),
        (dict(weights=torch.zeros(5, 2, device="meta")), ValueError),
        (dict(vision_mask=torch.ones(4, dtype=torch.bool)), ValueError),
        (dict(vision_mask=torch.ones(5)), TypeError),
        (dict(num_experts=0), ValueError),
        (dict(num_experts=6.0), TypeError),
        (dict(budget=0), ValueError),
        (dict(budget=7), ValueError),
        (dict(budget=True), TypeError),
        (dict(backend="cuda"), ValueError),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else None,
)
def test_bad_input_names_the_argument(wrong, error):
    with pytest.raises(error, match=f"^{next(iter(wrong))}"):
        choose_experts(**(GOOD | wrong))
