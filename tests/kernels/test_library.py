"""What all ops have in common."""

import functools

import pytest
import torch
from conftest import DEVICE

import fastmmoe_kernels as fk

from .batches import random_batch

BACKENDS = ("torch", "triton")


def random_tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


def route(**options):
    (logits,) = random_tensors((9, 6))
    return fk.topk_routing(logits, 3, return_probs=True, **options)


def gate(**options):
    hidden, weight, bias = random_tensors((9, 32), (6, 32), (6,))
    return fk.gate_routing(hidden, weight, 3, correction_bias=bias, return_probs=True, **options)


def share(**options):
    (logits,) = random_tensors((9, 6))
    chosen = fk.topk_routing(logits, 3, norm_topk_prob=False, backend="torch")
    mask = torch.arange(9, device=DEVICE) % 3 > 0
    return [fk.choose_experts(chosen.ids, chosen.weights, mask, num_experts=6, budget=2, **options)]


def attend(**options):
    query, key, sinks = random_tensors((2, 4, 16), (2, 2, 11, 16), (4,))
    return [fk.last_query_attention(query, key, sinks=sinks, scale=0.25, **options)]


def run_experts(**options):
    hidden, gate_up, down, weights = random_tensors((9, 16), (6, 32, 16), (6, 16, 16), (9, 2))
    ids = torch.arange(18, device=DEVICE).view(9, 2) % 7
    return [fk.moe_experts(hidden, gate_up, down, ids, weights, **options)]


def score(**options):
    batch = random_batch(0, [12, 9], 0.9, "left").to(DEVICE, torch.float32)
    scoring = dict(window=3, alpha=0.5, strategy="hybrid")
    return fk.window_redundancy(batch.probs, batch.importance, batch.layout, **scoring, **options)


def prune(**options):
    """With both rankings that `prune_batch` works out itself."""
    batch = random_batch(0, [12, 9], 0.9, "left").to(DEVICE, torch.float32)
    streams = (batch.hidden, batch.residual, batch.probs, batch.importance, batch.layout)
    options |= dict(keep_ratio=0.5, merge_ratio=0.3, window=3, alpha=0.5)
    by_norm = fk.prune_batch(*streams, strategy="routing_similarity", merge_method="mlerp", **options)
    by_redundancy = fk.prune_batch(*streams, strategy="hybrid", keep_by="redundancy", merge_method="mean", **options)
    return [
        tensor for pruned in (by_norm, by_redundancy) for tensor in (*pruned[:4], pruned.layout.run_rank, pruned.valid)
    ]


OPS = {
    "choose_experts": share,
    "gate_routing": gate,
    "last_query_attention": attend,
    "moe_experts": run_experts,
    "prune_batch": prune,
    "topk_routing": route,
    "window_scores": score,
}


def test_every_op_is_here():
    assert set(OPS) == set(torch.ops.fastmmoe)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_no_bit(op, dtype, backend):
    """A model may run under it; what an op promises in float32 is computed in float32."""
    want = OPS[op](backend=backend)
    with torch.autocast(DEVICE.type, dtype):
        got = OPS[op](backend=backend)
    for have, expected in zip(got, want, strict=True):
        assert have.dtype == expected.dtype and torch.equal(have, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_no_bit_of_a_compiled_op(backend):
    """Entered outside of the graph, or within."""
    query, key = random_tensors((2, 4, 16), (2, 2, 11, 16))

    def attend(query, key):
        return fk.last_query_attention(query, key, scale=0.25, backend=backend)

    def attend_within(query, key):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return attend(query, key)

    want = attend(query, key)
    compile_ = functools.partial(torch.compile, fullgraph=True, backend="eager")
    assert torch.equal(compile_(attend_within)(query, key), want)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(compile_(attend)(query, key), want)


def test_a_backward_pass_is_refused():
    """Rather than gradients that miss a part."""
    hidden = torch.randn(3, 8, requires_grad=True)
    gate_up, down = torch.randn(2, 8, 8), torch.randn(2, 8, 4)
    ids, weights = torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
    with pytest.raises(NotImplementedError, match="fastmmoe::moe_experts has no backward pass"):
        fk.moe_experts(hidden, gate_up, down, ids, weights).sum().backward()
    query, key = torch.randn(1, 2, 4, requires_grad=True), torch.randn(1, 1, 5, 4)
    with pytest.raises(NotImplementedError, match="fastmmoe::last_query_attention has no backward pass"):
        fk.last_query_attention(query, key, scale=0.5).sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_an_op_runs_where_its_tensors_are():
    """A model spread over several GPUs: the current device is another one."""
    logits = torch.randn(5, 8)
    want = fk.topk_routing(logits, 2)
    got = fk.topk_routing(logits.to("cuda:1"), 2)
    assert torch.cuda.current_device() == 0 and got.ids.device == torch.device("cuda:1")
    assert torch.equal(got.ids.cpu(), want.ids)
    torch.testing.assert_close(got.weights.cpu(), want.weights)
