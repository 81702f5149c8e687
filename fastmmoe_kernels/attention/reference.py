"""Attention of the last token in PyTorch: the definition, and the CPU path."""

import torch


def last_query_attention_reference(
    query: torch.Tensor,  # [B, Hq, D]
    key: torch.Tensor,  # [B, Hkv, n, D]
    key_mask: torch.Tensor | None,  # [B, n] or [B, Hm, n]
    sinks: torch.Tensor | None,  # [Hq]
    scale: float,
) -> torch.Tensor:
    num_keys = key.shape[2]
    grouped = query.float().unflatten(1, (key.shape[1], -1))  # [B, Hkv, Hq/Hkv, D]
    logits = (grouped @ key.float().mT).flatten(1, 2) * scale  # [B, Hq, n]
    if key_mask is not None:
        rows = key_mask if key_mask.dim() == 3 else key_mask.unsqueeze(1)  # [B, Hm, n]
        logits = logits.unflatten(1, (rows.shape[1], -1)).masked_fill(~rows.unsqueeze(2), float("-inf")).flatten(1, 2)
    if sinks is not None:
        logits = torch.cat((logits, sinks.float()[:, None].expand(len(logits), -1, 1)), -1)  # [B, Hq, n + 1]
    # the softmax of a head that reads NaN, or no valid key, is NaN at masked keys too
    probs = logits.softmax(-1).masked_fill(logits == float("-inf"), 0.0)
    return probs[..., :num_keys].mean(1)
