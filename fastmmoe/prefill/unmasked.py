"""No mask of a full batch while a CUDA graph is captured.

transformers leaves out a mask that says nothing, for SDPA to run flash attention, except where it cannot read the
batch: while a stream captures it writes out all n^2 pairs. The host knows from the layout that the batch is full. So
the text model's config then names a mask function that makes none, under a name equal to the real one.
"""

from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.utils import import_utils

from fastmmoe.prefill.attention import CapturingName
from fastmmoe.prefill.patch import ConfigPatch
from fastmmoe.prefill.running import RUNNING

_SDPA = CapturingName("sdpa")


def _mask_of_full_batch(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """None for plain causal attention among the new tokens; every other mask is what transformers makes."""
    is_plain = kwargs.get("allow_is_causal_skip") and kwargs.get("local_size") is None
    if is_plain and kwargs["q_length"] == kwargs["kv_length"]:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


ALL_MASK_ATTENTION_FUNCTIONS.register(_SDPA, _mask_of_full_batch)


class MaskNamePatch(ConfigPatch):
    """Gives the text model, which makes the masks, a name for its attention under which ours is found."""

    part = "text model"
    attribute = "_attn_implementation"

    def computed(self, value: Any) -> Any:
        forward = RUNNING.forward
        if not self.live or forward is None or forward.installation is not self.installation or value != "sdpa":
            return value
        if forward.past or not forward.is_full(len(forward.segments) - 1):
            return value
        return _SDPA if import_utils.is_cuda_stream_capturing() else value
