"""Read one row of a layer's attention, whichever implementation the model uses (method section 2.3).

An attention module asks its config for the implementation to call. At a prune layer that config is wrapped, so that,
while a capture is armed, the answer is a function of ours: it computes the one row and hands on to the real one.
"""

import sys
from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "fastmmoe_capture"
CAPTURE = "_fastmmoe_capture"  # attribute of an attention module at a prune layer: (query, key, scale) -> None


class OverriddenConfig:
    """A module's config of which single attributes are computed; everything else is the config's own."""

    def __init__(self, config: object, **computed: Callable[[], object]):
        self.__dict__.update(_config=config, _computed=computed)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # copy and pickle probe an object before it has any state
            raise AttributeError(name)
        computed = self.__dict__["_computed"].get(name)
        return getattr(self.__dict__["_config"], name) if computed is None else computed()

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.__dict__["_config"], name, value)


def capturing_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hand query [B, Hq, n, D] and key [B, Hkv, kv, D] to the module's capture, then run the model's own attention."""
    # this disarms the capture: flash attention reads `module.config._attn_implementation` again
    module.__dict__[CAPTURE](query, key, kwargs["scaling"])
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    return attend(module, query, key, value, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(NAME, capturing_attention)
