"""Window redundancy: torch backend and Triton against the float64 reference."""

import oracle
import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmoe_kernels import VisionLayout, window_redundancy
from fastmmoe_kernels.redundancy import STRATEGIES, kernel, window_scores

from .batches import batches, random_batch

BACKENDS = ("torch", "triton")


def check(batch, backend, **settings):
    device = batch.to(DEVICE, torch.float32)
    got = window_redundancy(device.probs, device.importance, device.layout, backend=backend, **settings)
    want = oracle.window_redundancy(
        batch.probs.numpy(), batch.importance.numpy(), batch.vision.numpy(), batch.valid.numpy(), **settings
    )
    for name, g, w in zip("SAC", got, want, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.cpu(), torch.from_numpy(w).float(), rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(
    batch=batches() | batches(ties=True),
    window=st.integers(1, 5),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    strategy=st.sampled_from(STRATEGIES),
)
def test_equals_reference(backend, batch, window, alpha, strategy):
    check(batch, backend, window=window, alpha=alpha, strategy=strategy)


@pytest.mark.parametrize("window", [1, 3, 64], ids=lambda w: f"W={w}")
def test_row_in_several_blocks(window, monkeypatch):
    """More tokens than the normalising kernel takes at a time; windows longer than most runs."""
    monkeypatch.setattr(kernel, "BLOCK_N", 16)
    check(random_batch(0, [70], 0.99, "left", experts=3), "triton", window=window, alpha=0.5, strategy="hybrid")


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_form_is_empty_outside_windows(backend):
    batch = random_batch(1, [12, 7], 0.6, "left").to(DEVICE, torch.float32)
    s, a, c, windows = window_scores(batch.probs, batch.importance, batch.layout.run_rank, 3, 0.5, "hybrid", backend)
    head = (batch.layout.run_rank >= 0) & (batch.layout.run_rank % 3 == 0)
    assert (s[~head] == 0).all() and (a[~head] == 0).all() and (c[~head] == float("-inf")).all()
    assert windows.tolist() == head.sum(1).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_vision_tokens(backend):
    batch = random_batch(2, [5], 0.0, "left").to(DEVICE, torch.float32)
    for scores in window_redundancy(
        batch.probs, batch.importance, batch.layout, window=3, alpha=0.5, strategy="hybrid", backend=backend
    ):
        assert scores.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_windows_tie_exactly(backend):
    """Ties are broken by position, so equal windows must get equal scores, wherever they stand."""
    probs = torch.randn(1, 3, 8).softmax(-1).repeat(1, 20, 1).to(DEVICE)
    importance = torch.rand(1, 3).repeat(1, 20).to(DEVICE)
    layout = VisionLayout.from_mask(torch.ones(1, 60, dtype=torch.bool, device=DEVICE))
    _, _, c = window_redundancy(probs, importance, layout, window=3, alpha=0.4, strategy="hybrid", backend=backend)
    assert c.unique().numel() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    batch = random_batch(3, [9, 4], 0.8, "right").to(DEVICE, torch.float32)
    probs, importance = batch.probs.nan_to_num(), batch.importance.nan_to_num()
    torch.library.opcheck(window_scores, (probs, importance, batch.layout.run_rank, 3, 0.5, "hybrid", backend))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": 0}, ValueError, "window"),
        ({"window": 2**30 + 1}, ValueError, r"window: expected an int in 1\.\.1073741824"),
        ({"window": True}, TypeError, "window"),
        ({"alpha": 1.5}, ValueError, "alpha"),
        ({"alpha": float("nan")}, ValueError, "alpha"),
        ({"strategy": "best"}, ValueError, "strategy"),
        ({"probs": torch.zeros(1, 5)}, ValueError, "probs"),
        ({"probs": torch.zeros(1, 5, 2, dtype=torch.float16)}, TypeError, "probs"),
        ({"importance": torch.zeros(1, 4)}, ValueError, "importance"),
        ({"importance": None}, TypeError, "importance"),
        ({"layout": None}, TypeError, "layout"),
        ({"backend": "cuda"}, ValueError, "backend"),
    ],
)
def test_bad_input_is_named(change, error, message):
    layout = VisionLayout.from_mask(torch.ones(1, 5, dtype=torch.bool))
    arguments = dict(
        probs=torch.zeros(1, 5, 2), importance=torch.zeros(1, 5), layout=layout, window=3, alpha=0.5, strategy="hybrid"
    )
    with pytest.raises(error, match=message):
        window_redundancy(**arguments | change)
