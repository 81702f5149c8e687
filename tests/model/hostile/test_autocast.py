"""`torch.autocast`: the operations of a prefill meet in whatever dtypes it gives them."""

import pytest
import torch

import fastmmoe

from .common import batch_of, config_of, enabled_logits, fresh, generate, logits_of, stock_logits

cosine = torch.nn.functional.cosine_similarity


@pytest.fixture(params=["bfloat16", "float16"])
def dtype(request):
    return getattr(torch, request.param)


@pytest.mark.parametrize("changes", [{}, {"strategy": "routing_similarity"}], ids=["hybrid", "routing"])
def test_a_prefill_under_autocast(family, config, dtype, changes):
    batch, model = batch_of(family), fresh(family)
    stock = logits_of(model, batch)[:, -1]
    with torch.autocast("cpu", dtype=dtype):
        # how far autocast takes the stock model
        near = cosine(logits_of(model, batch)[:, -1].float(), stock).min()
    assert near > 0.9
    fastmmoe.enable(model, config_of(config, **changes if config != "experts" else {}))
    want = logits_of(model, batch)[:, -1]
    tokens = fastmmoe.report(model).tokens_per_layer
    with torch.autocast("cpu", dtype=dtype):
        got = logits_of(model, batch)
    assert got.isfinite().all()
    assert fastmmoe.report(model).tokens_per_layer == tokens
    assert cosine(got[:, -1].float(), want).min() > 0.9
    # and nothing of it stays
    assert torch.equal(logits_of(model, batch)[:, -1], want)
    fastmmoe.disable(model)
    assert torch.equal(logits_of(model, batch), stock_logits(family))


def test_decoding_under_autocast(family, config):
    """From a prefill under autocast, and from one without."""
    batch, model = batch_of(family), fresh(family)
    fastmmoe.enable(model, config_of(config))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = generate(model, batch)
    assert out.shape == (2, 4)
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
            token = torch.tensor([[5], [7]])
            step = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    assert step.isfinite().all()
    assert torch.equal(logits_of(model, batch), enabled_logits(family, config))
