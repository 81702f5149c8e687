"""The host-side plan: where a padded batch holds vision tokens, and how many of them a prune stage keeps.

Every count depends on the number of vision tokens alone, so all shapes of a prefill are known before it starts and
nothing waits for the device (method section 2.1). What a stage does to the *runs* of vision tokens is only known on
the device; it travels there as `run_rank`.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from fastmmoe_kernels.checks import check_float, check_int, check_tensor

MOST_TOKENS = 2**30  # kernels count them in 32 bits
INT_MASKS = (torch.bool, torch.uint8, torch.int32, torch.int64)


@dataclass(frozen=True)
class PrunePlan:
    """What one prune stage leaves of one sample.

    Attributes:
        target: vision tokens that survive, merged ones included; the sample's `n_vis` when it is not pruned.
        merged: windows that become one token each.
    """

    target: int
    merged: int


def prune_plan(runs: Sequence[int], keep_ratio: float, merge_ratio: float, window: int) -> PrunePlan:
    """Count the survivors of one sample at one prune stage (method section 2.1).

    Args:
        runs: lengths of the sample's runs of consecutive vision tokens, in order.
        keep_ratio: share of the vision tokens that this stage keeps, in (0, 1].
        merge_ratio: share of the survivors that are merged windows, in [0, 1].
        window: tokens per window, 1 to 2**30.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.
    """
    for i, run in enumerate(runs):
        check_int(f"runs[{i}]", run, 1)
    check_prune_ratios(keep_ratio, merge_ratio, window)
    target, most = _target_and_most_merged(sum(runs), keep_ratio, merge_ratio, window)
    windows = sum(math.ceil(run / window) for run in runs)
    return PrunePlan(target, max(0, min(most, windows - 1)))


def check_prune_ratios(keep_ratio: float, merge_ratio: float, window: int) -> None:
    """Refuse a `keep_ratio`, `merge_ratio` or `window` out of range."""
    check_float("keep_ratio", keep_ratio, 0.0, 1.0, low_open=True)
    check_float("merge_ratio", merge_ratio, 0.0, 1.0)
    check_int("window", window, 1, MOST_TOKENS)


def _target_and_most_merged(n_vis: int, keep_ratio: float, merge_ratio: float, window: int) -> tuple[int, int]:
    """(target, merged before the bound by the number of windows); (n_vis, 0) when the sample is not pruned."""
    target = max(1, int(n_vis * keep_ratio))
    if n_vis <= 1 or target >= n_vis:
        return n_vis, 0
    return target, min(int(target * merge_ratio), (n_vis - target) // max(1, window - 1))


@dataclass(frozen=True, eq=False)
class VisionLayout:
    """Where the tokens of a padded batch are. Build it with `VisionLayout.from_mask`.

    Attributes:
        width: padded length n.
        lengths: valid tokens per sample.
        n_vision: vision tokens per sample.
        tails: valid tokens behind the prompt's last vision token, per sample; all of them when it has none. Pruning
            leaves them alone.
        padding_side: "left" or "right"; "left" for a batch without padding.
        run_rank: int32 [B, n], a vision token's rank in its run of consecutive vision tokens, -1 for any other token.
    """

    width: int
    lengths: tuple[int, ...]
    n_vision: tuple[int, ...]
    tails: tuple[int, ...]
    padding_side: str
    run_rank: torch.Tensor = field(repr=False)
    _tables: dict = field(default_factory=dict, repr=False)

    @classmethod
    def from_mask(cls, vision_mask: torch.Tensor, attention_mask: torch.Tensor | None = None) -> "VisionLayout":
        """Describe a batch. This is the one place that reads the masks on the host: a device sync for masks on a GPU.

        Args:
            vision_mask: bool [B, n], true at vision tokens. Those at padding positions are ignored.
            attention_mask: bool (or 0/1 integers) [B, n], true at valid tokens; None when all are valid. Padding
                stands on one side, the same for the whole batch.

        Raises:
            TypeError, ValueError: wrong shapes or dtypes, padding in the middle of a sample or on both sides.
        """
        check_tensor("vision_mask", vision_mask, ("B", "n"), (torch.bool,))
        if attention_mask is None:
            attention_mask = torch.ones_like(vision_mask)
        check_tensor("attention_mask", attention_mask, tuple(vision_mask.shape), INT_MASKS)
        device = vision_mask.device
        host = torch.stack((vision_mask, attention_mask.to(device=device, dtype=torch.bool))).cpu()
        valid = host[1]
        vision = host[0] & valid
        lengths = valid.sum(1)
        width = valid.shape[1]
        position = torch.arange(width)
        is_right = bool((valid == (position < lengths[:, None])).all())
        is_left = bool((valid == (position >= width - lengths[:, None])).all())
        if not (is_left or is_right):
            raise ValueError(
                "attention_mask: expected padding on one side of all samples (left or right), got padding on both "
                "sides or inside a sample"
            )
        # rank in the run = distance to the last token that is no vision token
        last_other = torch.where(vision, -1, position).cummax(1).values if width else position.expand(valid.shape)
        run_rank = torch.where(vision, position - last_other - 1, -1).to(torch.int32)
        behind = valid & ~vision.flip(1).cummax(1).values.flip(1)
        return cls(
            width,
            tuple(lengths.tolist()),
            tuple(vision.sum(1).tolist()),
            tuple(behind.sum(1).tolist()),
            "left" if is_left else "right",
            run_rank.to(device, non_blocking=True),
        )

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        return self.run_rank.device

    def to(self, device: torch.device) -> "VisionLayout":
        """The same layout with its device side on `device`; itself when it is there already."""
        if self.run_rank.device == device:
            return self
        return dataclasses.replace(self, run_rank=self.run_rank.to(device, non_blocking=True))

    def device_table(self, rows: tuple[tuple[int, ...], ...]) -> torch.Tensor:
        """Host integers as int32 [rows, B] on the layout's device.

        The layout and all that pruning makes of it keep the tensor: a CUDA graph may read it as long as they live.
        """
        key = (rows, self.device)
        if key not in self._tables:
            self._tables[key] = torch.tensor(rows, dtype=torch.int32).to(self.device, non_blocking=True)
        return self._tables[key]

    @property
    def starts(self) -> tuple[int, ...]:
        """Position of each sample's first valid token."""
        return tuple(self.width - length if self.padding_side == "left" else 0 for length in self.lengths)

    @cached_property
    def runs(self) -> tuple[tuple[int, ...], ...]:
        """Lengths of each sample's runs of vision tokens, in order. Reads the device: not for the hot path."""
        # a window longer than the row never cuts a run
        return tuple(tuple(len(run) for run in sample) for sample in self.windows(self.width + 1))

    def windows(self, window: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Positions in each window, per sample: runs cut into `window` tokens, the last of a run may be short.

        Reads the device: not for the hot path.
        """
        check_int("window", window, 1, MOST_TOKENS)
        samples = []
        for ranks in self.run_rank.tolist():
            sample: list[list[int]] = []
            for position, rank in enumerate(ranks):
                if rank >= 0:
                    if rank % window == 0:
                        sample.append([])
                    sample[-1].append(position)
            samples.append(tuple(map(tuple, sample)))
        return tuple(samples)

    @property
    def vision_mask(self) -> torch.Tensor:
        """bool [B, n], true at vision tokens."""
        return self.run_rank >= 0

    @property
    def valid_mask(self) -> torch.Tensor:
        """bool [B, n], true at valid tokens."""
        position = torch.arange(self.width, device=self.device)
        start, length = self.device_table((self.starts, self.lengths)).unsqueeze(-1)
        return (position >= start) & (position < start + length)

    @property
    def is_full(self) -> bool:
        """Whether no sample has padding."""
        return all(length == self.width for length in self.lengths)

    def prune_counts(self, keep_ratio: float, merge_ratio: float, window: int) -> "PruneCounts":
        """Counts of a prune stage on this batch; `merged` still to be bounded by the number of windows minus one."""
        plans = [_target_and_most_merged(n, keep_ratio, merge_ratio, window) for n in self.n_vision]
        counts = self.counts_of(tuple(target for target, _ in plans))
        return dataclasses.replace(counts, most_merged=tuple(merged for _, merged in plans))

    def counts_of(self, targets: tuple[int, ...]) -> "PruneCounts":
        """Counts of a stage that leaves `targets[b]` vision tokens of sample b and merges nothing."""
        lengths = tuple(
            length - n + target for length, n, target in zip(self.lengths, self.n_vision, targets, strict=True)
        )
        return PruneCounts(targets, (0,) * len(targets), lengths)


@dataclass(frozen=True)
class PruneCounts:
    """Counts of one prune stage on a batch, per sample.

    Attributes:
        targets: vision tokens that survive.
        most_merged: merged windows before the bound "one window fewer than there are", which needs the runs.
        lengths: valid tokens that survive.
    """

    targets: tuple[int, ...]
    most_merged: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def width(self) -> int:
        return max(self.lengths, default=0)
