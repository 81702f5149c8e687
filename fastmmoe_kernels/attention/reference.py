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
        logits = _fill_masked(logits, key_mask, float("-inf"))
    if sinks is not None:
        logits = torch.cat((logits, sinks.float()[:, None].expand(len(logits), -1, 1)), -1)  # [B, Hq, n + 1]
    probs = logits.softmax(-1)[..., :num_keys]
    if key_mask is not None:
        # the softmax of a head without valid keys is NaN
        probs = _fill_masked(probs, key_mask, 0.0)
    return probs.mean(1)


def _fill_masked(x: torch.Tensor, key_mask: torch.Tensor, value: float) -> torch.Tensor:
    """x [B, Hq, n] with `value` at the keys that a head's row of the mask leaves out."""
    rows = key_mask if key_mask.dim() == 3 else key_mask.unsqueeze(1)  # [B, Hm, n]
    return x.unflatten(1, (rows.shape[1], -1)).masked_fill(~rows.unsqueeze(2), value).flatten(1, 2)
