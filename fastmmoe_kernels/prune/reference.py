"""A prune stage in PyTorch: the definition, and the CPU path."""

import torch

from fastmmoe_kernels.prune.arguments import PruneArguments, PruneResults
from fastmmoe_kernels.redundancy.reference import window_head


def prune_batch_reference(stage: PruneArguments) -> PruneResults:
    hidden, run_rank, width, window = stage.hidden, stage.run_rank, stage.width, stage.window
    n = run_rank.shape[1]
    start, length, target, most, new_start = stage.table.long().unsqueeze(-1)  # each [B, 1]
    position = torch.arange(n, device=hidden.device)
    vision = run_rank >= 0
    text = (position >= start) & (position < start + length) & ~vision

    # merge: the windows with the largest redundancy
    count = torch.minimum(most, stage.windows.unsqueeze(-1) - 1).clamp_min(0)  # [B, 1]
    is_merged_head, by_redundancy = _largest(stage.redundancy, count)
    # keep: of the others, the most important tokens
    in_merged = vision & is_merged_head.gather(1, window_head(run_rank, window))
    kept, _ = _largest(torch.where(vision & ~in_merged, stage.importance, float("-inf")), target - count)
    survives = text | is_merged_head | kept

    # compact: where each survivor goes, and where each new token came from
    before = survives.cumsum(1) - survives.long()  # survivors in front of a token
    slot = torch.where(survives, new_start + before, width)  # the last column is scratch
    origin = torch.full((hidden.shape[0], width + 1), -1, device=hidden.device)
    origin = origin.scatter_(1, slot, position.expand_as(slot))[:, :width]
    valid = origin >= 0
    origin = origin.clamp_min(0)
    index = torch.where(valid, origin if stage.source is None else stage.source.gather(1, origin), -1)
    merged = is_merged_head.gather(1, origin) & valid
    run_start = (position - run_rank).clamp(0, max(n - 1, 0))
    new_rank = torch.where(vision, before - before.gather(1, run_start), -1)
    new_rank = torch.where(valid, new_rank.gather(1, origin), -1).to(torch.int32)

    heads = by_redundancy[:, : stage.most_merged]  # [B, M]
    into = torch.where(is_merged_head.gather(1, heads), slot.gather(1, heads), width)
    offset = torch.arange(window, device=hidden.device)
    members = (heads.unsqueeze(-1) + offset).clamp_max(max(n - 1, 0))  # [B, M, W]
    expected_rank = run_rank.gather(1, heads).unsqueeze(-1) + offset
    is_member = run_rank.gather(1, members.flatten(1)).view_as(members) == expected_rank

    def shorten(x: torch.Tensor) -> torch.Tensor:
        moved = torch.where(valid.unsqueeze(-1), _rows(x, origin), 0)
        out = torch.nn.functional.pad(moved, (0, 0, 0, 1))  # the last row is scratch
        if stage.most_merged:
            tokens = _rows(x, members.flatten(1)).view(*members.shape, -1)  # [B, M, W, H]
            merge = _mlerp if stage.merge_method == "mlerp" else _mean
            out.scatter_(1, into.unsqueeze(-1).expand(-1, -1, x.shape[2]), merge(tokens.float(), is_member).to(x.dtype))
        return out[:, :width].contiguous()

    return shorten(hidden), shorten(stage.residual), index, merged, valid, new_rank


def _largest(keys: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of [B, n] are the `count` [B, 1] largest, ties to the earlier and -inf never; and the falling order."""
    order = keys.sort(dim=1, descending=True, stable=True).indices
    position = torch.arange(keys.shape[1], device=keys.device)
    taken = torch.zeros_like(keys, dtype=torch.bool).scatter_(1, order, position < count)
    return taken & (keys != float("-inf")), order


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [B, n, H] at index [B, m] -> [B, m, H]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def _mean(tokens: torch.Tensor, is_member: torch.Tensor) -> torch.Tensor:
    tokens = torch.where(is_member.unsqueeze(-1), tokens, 0.0)
    return tokens.sum(2) / is_member.sum(2, keepdim=True).clamp_min(1)


def _mlerp(tokens: torch.Tensor, is_member: torch.Tensor) -> torch.Tensor:
    """The mean's direction with the largest norm in the window."""
    mean = _mean(tokens, is_member)
    norms = torch.linalg.vector_norm(tokens, dim=-1).masked_fill(~is_member, 0.0)
    length = torch.linalg.vector_norm(mean, dim=-1, keepdim=True).clamp_min(1e-10)
    return mean / length * norms.amax(2, keepdim=True)
