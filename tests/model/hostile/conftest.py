"""Fixtures of this folder."""

import pytest
import torch

from .common import CONFIGS, FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=CONFIGS)
def config(request):
    """The name of one of the configs."""
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    """Results that are compared bit for bit must not depend on which thread computed them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield
