"""What only the oldest transformers has."""

import pytest

import fastmmoe
from fastmmoe import FastMMoEConfig

from . import tiny_families


@pytest.mark.skipif(not tiny_families.IS_5_17, reason="transformers 5.17 only")
@pytest.mark.parametrize("config", [FastMMoEConfig(vision_top_k=2), FastMMoEConfig(prune_layers=(2,), retention=0.5)])
def test_a_gate_of_another_kind_is_refused(config):
    model, _ = tiny_families.aria()
    with pytest.raises(ValueError, match="layer 2's gate .Linear. is not Aria's .AriaTextTopKRouter."):
        fastmmoe.enable(model, config)
