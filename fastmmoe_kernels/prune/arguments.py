"""What both backends of `prune_batch` take and return."""

from typing import NamedTuple

import torch


class PruneArguments(NamedTuple):
    """A checked and scored batch: B samples of n tokens, of which the longest is left with `width`.

    `library.register` flattens it: the order and types of the fields are the op's schema.
    """

    hidden: torch.Tensor  # [B, n, H]
    residual: torch.Tensor  # [B, n, H]
    importance: torch.Tensor  # float32 [B, n], what ranks the tokens outside merged windows
    redundancy: torch.Tensor  # float32 [B, n], -inf where no window begins
    windows: torch.Tensor  # int32 [B]
    run_rank: torch.Tensor  # int32 [B, n]
    table: torch.Tensor  # int32 [5, B]: start, length, target, most_merged, new start
    source: torch.Tensor | None  # int64 [B, n]
    width: int
    most_merged: int  # the table's largest; for the torch backend, which gathers the merged windows
    window: int
    merge_method: str


# hidden and residual, [B, width, H]; index, merged, valid and run_rank, [B, width]
PruneResults = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
