"""Shared set-up: Triton's interpreter on machines without a GPU, and NaN in every tensor that nobody wrote yet."""

import os

import hypothesis
import pytest
import torch
import torch.distributed as dist

from fastmmoe_kernels.backend import TRITON_INSTALLED
from fastmmoe_kernels.interpreter import mend_interpreter

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # before any kernel module is imported: triton.jit decides at decoration time
    os.environ["TRITON_INTERPRET"] = "1"
    if TRITON_INSTALLED:
        mend_interpreter()

# no test is timed: on a machine that does other things an example takes what it takes
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")

# it has a pytest.ini of its own: make test-transformers
collect_ignore = ["transformers_suite"]


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """`torch.empty` and friends return NaN (or absurd integers), so that an element nobody writes shows up."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.is_floating_point():
                return out.fill_(float("nan"))
            return out.fill_(True) if out.dtype == torch.bool else out.fill_(101)

        return wrapper

    if os.environ.get("FASTMMOE_NO_POISON"):
        return
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def one_process(tmp_path):
    """What the trainings' collective calls need."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pytest_collection_modifyitems(items):
    if not HAS_GPU:
        skip = pytest.mark.skip(reason="needs a GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
