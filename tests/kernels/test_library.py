"""What all ops have in common."""

import pytest
import torch

import fastmmoe_kernels as fk


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
