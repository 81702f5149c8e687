"""Some rows of a layer's attention, averaged over heads, from the queries and keys that its attention call gets."""

import torch

from fastmmoe_kernels import VisionLayout


def attention_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
    key_mask: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention probabilities of some query tokens, mean over heads.

    Costs O(Hq T keys) memory: callers hand in as many rows at a time as they can afford.

    Args:
        query: floating [B, Hq, n, D], of the new tokens, position encoding applied.
        key: floating [B, Hkv, keys, D], cached tokens first and then the new ones; Hkv divides Hq.
        positions: int64 [B, T], which of the n new tokens; -1 for no row.
        scale: factor of the logits.
        key_mask: bool [B, keys], true at valid keys; None: all are valid.
        visible: bool [B, Hm, n, keys], which keys each new token sees, where attention is not causal; Hm divides Hq.
        sinks: floating [Hq], logits of keys without a value, one per head; None: there are none.

    Returns:
        float32 [B, T, keys]; zeros where `positions` is -1, and at masked keys and keys behind the query.
    """
    past = key.shape[2] - query.shape[2]
    is_row = (positions >= 0).unsqueeze(-1)  # [B, T, 1]
    rows = positions.clamp_min(0)  # [B, T]
    asking = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))  # [B, Hq, T, D]
    if visible is None:
        visible = (torch.arange(key.shape[2], device=key.device) <= rows.unsqueeze(-1) + past).unsqueeze(1)
    else:
        visible = visible.gather(2, rows[:, None, :, None].expand(-1, visible.shape[1], -1, key.shape[2]))
        visible = visible.repeat_interleave(query.shape[1] // visible.shape[1], 1)  # [B, Hq, T, keys]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
    visible = visible & is_row.unsqueeze(1)
    grouped = asking.float().unflatten(1, (key.shape[1], -1))  # [B, Hkv, Hq/Hkv, T, D]
    logits = (grouped @ key.float().unsqueeze(2).mT).flatten(1, 2) * scale  # [B, Hq, T, keys]
    logits = logits.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.cat((logits, sink), -1).softmax(-1)[..., :-1].mean(1)
    # a row without any key is NaN
    return logits.softmax(-1).masked_fill(~visible, 0.0).mean(1)


def last_positions(layout: VisionLayout, counts: tuple[int, ...], back: int = 0) -> torch.Tensor:
    """Positions of each sample's last `counts[b]` tokens, `back` tokens from its end, in order.

    Returns:
        int64 [B, max(counts)] on the layout's device, -1 in front where a sample has fewer.
    """
    ends = tuple(start + length - back for start, length in zip(layout.starts, layout.lengths, strict=True))
    end, count = layout.device_table((ends, counts)).long().unsqueeze(-1)
    from_end = torch.arange(-max(counts), 0, device=layout.device)
    return torch.where(from_end >= -count, end + from_end, -1)
