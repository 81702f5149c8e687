"""A gate's probabilities, computed beside the model's own forward."""

from typing import Any

import torch
from torch import nn

from fastmmoe_kernels import gate_routing


def gate_probs(gate: nn.Module, hidden: torch.Tensor, options: dict[str, Any], backend: str) -> torch.Tensor:
    """The gate's probabilities, float32 [B, n, E], for hidden [B, n, H]; `options` are the adapter's of this gate."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    if is_linear(gate, hidden):
        probs = gate_routing(flat, gate.weight, **options, return_probs=True, backend=backend).probs
    else:
        # forward, not __call__: output recorders should not see this extra pass
        logits = gate.forward(flat)[0].float()
        probs = logits.softmax(-1) if options["scoring"] == "softmax" else logits.sigmoid()
    return probs.view(*hidden.shape[:-1], -1)


def is_linear(gate: nn.Module, hidden: torch.Tensor) -> bool:
    """Whether a gate's logits are its weight times hidden: no adapter around it, no weight that is elsewhere."""
    weight = gate._parameters.get("weight")
    return weight is not None and not gate._modules and weight.device == hidden.device and weight.dtype == hidden.dtype
