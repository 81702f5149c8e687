"""No mask of a full batch while a CUDA graph is captured.

transformers leaves out a mask that says nothing, for SDPA to run flash attention, except where it cannot read the
batch: while a stream captures it writes out all n^2 pairs. The host knows from the layout that the batch is full. So
what makes SDPA's masks, in transformers' own registry, asks for that first.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.utils import import_utils

from fastmmoe.prefill.running import RUNNING

_SDPA = "sdpa"


class _MaskUnlessFull:
    """Makes no mask for plain causal attention of a captured, full batch; else calls what it covers."""

    def __init__(self, covered: Callable):
        self.covered = covered

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        forward = None if torch.compiler.is_compiling() else RUNNING.forward
        if forward is None or not import_utils.is_cuda_stream_capturing():
            return self.covered(*args, **kwargs)
        # another model may be called from within
        is_ours = kwargs.get("config") is forward.text_config
        is_full = is_ours and not forward.past and forward.is_full(len(forward.segments) - 1)
        is_plain = kwargs.get("allow_is_causal_skip") and kwargs.get("local_size") is None
        if is_full and is_plain and kwargs["q_length"] == kwargs["kv_length"]:
            return None
        return self.covered(*args, **kwargs)


def leave_out_full_masks() -> None:
    """Put it in place of what makes SDPA's masks, once. It hands on all but what is said above."""
    makes = ALL_MASK_ATTENTION_FUNCTIONS[_SDPA]
    if not isinstance(makes, _MaskUnlessFull):
        ALL_MASK_ATTENTION_FUNCTIONS.register(_SDPA, _MaskUnlessFull(makes))
