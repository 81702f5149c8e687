"""What tells a model's weights from another's."""

from __future__ import annotations

import hashlib

from transformers import PreTrainedModel

from fastmmoe.families import find_text_model


def gates_sha256(model: PreTrainedModel) -> str:
    """A digest of the gates of all MoE layers, in float32: it stands for all weights."""
    family, text, _ = find_text_model(model)
    digest = hashlib.sha256()
    for layer in text.layers:
        if family.is_moe(layer):
            weight = next(family.gate_of(layer).parameters())
            digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
