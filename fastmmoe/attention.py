"""See the attention of a layer, whichever implementation the model uses, and read one row of it (method section 2.3).

An attention module asks its config for the implementation to call. At a prune layer that config is wrapped, so that
in front of a prune stage the answer is a function of ours: it hands on what the real one gets, and then calls it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastmmoe_kernels import VisionLayout, last_query_attention

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
    # from here on the config gives the real answer: flash attention reads `module.config._attn_implementation` again
    module.__dict__[CAPTURE](query, key, kwargs["scaling"])
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    return attend(module, query, key, value, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(NAME, capturing_attention)


@dataclass(frozen=True)
class AttentionCall:
    """What the attention of a prune layer works on; all tensors are on one device.

    Attributes:
        query: floating [B, Hq, n, D], of the new tokens, position encoding applied.
        key: floating [B, Hkv, keys, D], cached tokens first and then the new ones.
        scale: factor of the logits.
        layout: of the n new tokens.
        key_mask: bool [B, keys], true at valid keys; None: all are valid.
        back: how many tokens at a sample's end are candidates or answers: the token in front of them asks.
    """

    query: torch.Tensor
    key: torch.Tensor
    scale: float
    layout: VisionLayout
    key_mask: torch.Tensor | None
    back: int


def last_row(call: AttentionCall, backend: str) -> torch.Tensor:
    """The asking token's attention to the new tokens, head mean: float32 [B, n]."""
    query, layout, back = call.query, call.layout, call.back
    n, keys = query.shape[2], call.key.shape[2]
    if layout.padding_side == "left":
        asking = query[:, :, n - 1 - back]  # [B, Hq, D]
    else:
        last = tuple(length - 1 - back for length in layout.lengths)
        last = layout.device_table((last,)).long().view(-1, 1, 1, 1).expand(-1, query.shape[1], 1, query.shape[3])
        asking = query.gather(2, last)[:, :, 0]
    mask = call.key_mask
    if back:
        # candidates behind the asking token are no keys of its row
        ends = tuple(
            keys - n + start + length - back for start, length in zip(layout.starts, layout.lengths, strict=True)
        )
        seen = torch.arange(keys, device=query.device) < layout.device_table((ends,)).view(-1, 1)
        mask = seen if mask is None else mask & seen
    row = last_query_attention(asking, call.key, scale=call.scale, key_mask=mask, backend=backend)
    return row[:, keys - n :].contiguous()
