"""Attention of the last token in PyTorch: the definition, and the CPU path."""

import torch


def last_query_attention_reference(
    query: torch.Tensor,  # [B, Hq, D]
    key: torch.Tensor,  # [B, Hkv, n, D]
    key_mask: torch.Tensor | None,  # [B, n]
    scale: float,
) -> torch.Tensor:
    grouped = query.float().unflatten(1, (key.shape[1], -1))  # [B, Hkv, Hq/Hkv, D]
    logits = (grouped @ key.float().mT).flatten(1, 2) * scale  # [B, Hq, n]
    if key_mask is None:
        return logits.softmax(-1).mean(1)
    probs = logits.masked_fill(~key_mask.unsqueeze(1), float("-inf")).softmax(-1).mean(1)
    # the softmax of a sample without valid keys is NaN
    return probs.masked_fill(~key_mask, 0.0)
