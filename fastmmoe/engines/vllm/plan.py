"""The host's plan of a step: which rows of a batch a prefill shortens, and how many tokens every layer sees of each.

What a prune stage leaves depends on counts alone (method section 2.1), so every length is known before the forward, as
vLLM needs it. Nothing here knows vLLM or a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch

from fastmmoe.config import ReductionConfig
from fastmmoe_kernels import VisionLayout

# why a prompt is not pruned -> in words
DENSE = {
    "few_vision_tokens": "it has fewer vision tokens than min_vision_tokens",
    "ends_in_vision": "it ends in a vision token, and no text asks about it",
    "prompt_logprobs": "log probabilities of its tokens are asked for, which dropped tokens do not have",
    "long": "it is longer than what is sure to be run in one step",
}


@dataclass(frozen=True)
class Rules:
    """What is decided about prompts, the same in the scheduler and in every worker.

    Attributes:
        config: what to reduce.
        longest: tokens of the longest prompt that is sure to be run in one step; a longer one may come in chunks, and
            is not pruned.
    """

    config: ReductionConfig
    longest: int


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what becomes of it. A pure function of the request and the rules.

    Attributes:
        length: tokens.
        vision: [start, end) of every run of vision tokens, rising.
        reduces: whether its vision tokens take fewer experts.
        left: vision tokens behind every stage, and in front of the first; () where it is not pruned.
        dense: why it is not pruned though the config would, a key of `DENSE`; "" else.
    """

    length: int
    vision: tuple[tuple[int, int], ...]
    reduces: bool
    left: tuple[int, ...]
    dense: str

    @classmethod
    def of(cls, rules: Rules, length: int, vision: Sequence[tuple[int, int]], wants_logprobs: bool) -> "Prompt":
        """
        Args:
            rules: of this server.
            length: tokens of the prompt.
            vision: [start, end) of runs of vision tokens.
            wants_logprobs: of the prompt's tokens, which tokens that are dropped do not have.
        """
        config = rules.config
        runs = _joined(vision)
        n_vision = sum(end - start for start, end in runs)
        reduces = n_vision > 0 and n_vision >= config.min_vision_tokens
        left = list(
            accumulate(range(len(config.prune_layers)), lambda n, s: config.vision_left(s, n), initial=n_vision)
        )
        dense = ""
        if left[-1] == n_vision:
            left = []
        elif not reduces:
            dense = "few_vision_tokens"
        elif runs[-1][1] == length:
            dense = "ends_in_vision"
        elif wants_logprobs:
            dense = "prompt_logprobs"
        elif length > rules.longest:
            dense = "long"
        return cls(length, runs, reduces, () if dense else tuple(left), dense)

    @property
    def n_vision(self) -> int:
        return sum(end - start for start, end in self.vision)

    @property
    def prunes(self) -> bool:
        return bool(self.left)

    def removed(self, stages: int) -> int:
        """Tokens gone behind so many stages."""
        return self.left[0] - self.left[stages] if self.left else 0


def _joined(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Runs of consecutive vision tokens: features that adjoin are one."""
    runs: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        elif end > start:
            runs.append((start, end))
    return tuple(runs)


@dataclass(frozen=True)
class Row:
    """A request's part of a step.

    Attributes:
        prompt: of the request.
        computed: tokens of it that are in the cache.
        new: tokens of this step.
        is_short: whether its cache holds, or is going to hold, fewer tokens behind prune stages.
    """

    prompt: Prompt
    computed: int
    new: int
    is_short: bool

    @property
    def is_pruned_now(self) -> bool:
        return self.is_short and self.computed == 0


@dataclass(frozen=True)
class Cut:
    """One prune stage of a step, as indices of the tokens in front of it and behind it.

    Attributes:
        layout: of the rows that are pruned, right-padded, on the CPU; None behind a stage that has shortened them, when
            only the device knows where their vision tokens are.
        padded: int64 [P * n], the token at each place of the padded rows; some token's at padding.
        asking: int64 [P], the token that ends each of their prompts.
        prompts: int64 [P], tokens of each of their prompts in front of this stage.
        packed: int64 [T'], where each token behind the stage comes from: of the T in front of it, or T + its place in
            the padded rows of n' tokens behind the stage.
    """

    layout: VisionLayout | None
    padded: np.ndarray
    asking: np.ndarray
    prompts: np.ndarray
    packed: np.ndarray


class Step:
    """The rows of one forward, in the batch's order.

    Attributes:
        stages: how many prune stages there are.
        rows: one per request.
    """

    def __init__(self, stages: int, rows: Sequence[Row]):
        self.stages, self.rows = stages, tuple(rows)

    @cached_property
    def prunes(self) -> bool:
        """Whether a row is shortened in this step."""
        return any(row.is_pruned_now for row in self.rows)

    @cached_property
    def n_vision(self) -> tuple[int, ...]:
        """Vision tokens that take fewer experts, in front of the first stage and behind each."""
        counts = [0] * (self.stages + 1)
        for row in self.rows:
            if not row.prompt.reduces or row.computed >= row.prompt.length:
                continue
            seen = sum(max(0, min(end, row.computed + row.new) - max(start, row.computed))
                       for start, end in row.prompt.vision)  # fmt: skip
            for stage in range(self.stages + 1):
                counts[stage] += row.prompt.left[stage] if row.is_pruned_now else seen
        return tuple(counts)

    def removed(self, stage: int) -> np.ndarray:
        """int32 [R], tokens that each row's cache lacks behind so many stages."""
        return np.array([row.prompt.removed(stage) if row.is_short else 0 for row in self.rows], np.int32)

    def lengths(self, stage: int) -> np.ndarray:
        """int32 [R], new tokens of each row behind so many stages."""
        return np.array(
            [row.new - (row.prompt.removed(stage) if row.is_pruned_now else 0) for row in self.rows], np.int32
        )

    def bounds(self, stage: int) -> np.ndarray:
        """int32 [R + 1], where rows begin behind so many stages, and their total."""
        return np.concatenate(([0], np.cumsum(self.lengths(stage)))).astype(np.int32)

    def vision_rows(self) -> np.ndarray:
        """bool [T], vision tokens that take fewer experts, in front of the first stage."""
        mask = np.zeros(int(self.bounds(0)[-1]), bool)
        for row, first in zip(self.rows, self.bounds(0), strict=False):
            if row.prompt.reduces:
                for start, end in row.prompt.vision:
                    mask[first + max(0, start - row.computed) : first + max(0, min(end - row.computed, row.new))] = True
        return mask

    def cut(self, stage: int) -> Cut:
        """The stage that so many others stand in front of."""
        pruned = [index for index, row in enumerate(self.rows) if row.is_pruned_now]
        before, after = self.bounds(stage), self.bounds(stage + 1)
        entering, leaving = self.lengths(stage), self.lengths(stage + 1)
        width, short = int(entering[pruned].max()), int(leaving[pruned].max())
        place = np.minimum(np.arange(width), entering[pruned, None] - 1) + before[pruned, None]
        prompts = np.array([self.rows[r].prompt.length - self.rows[r].prompt.removed(stage) for r in pruned])
        packed = np.empty(int(after[-1]), np.int64)
        for index in range(len(self.rows)):
            if not self.rows[index].is_pruned_now:
                packed[after[index] : after[index + 1]] = np.arange(before[index], before[index + 1])
        for number, index in enumerate(pruned):
            packed[after[index] : after[index + 1]] = before[-1] + number * short + np.arange(leaving[index])
        return Cut(
            self._layout(pruned) if not self.removed(stage)[pruned].any() else None,
            place.astype(np.int64).ravel(),
            (before[pruned] + prompts - 1).astype(np.int64),
            prompts.astype(np.int64),
            packed,
        )

    def _layout(self, pruned: list[int]) -> VisionLayout:
        lengths = self.lengths(0)[pruned]
        vision = np.zeros((len(pruned), int(lengths.max())), bool)
        for number, index in enumerate(pruned):
            for start, end in self.rows[index].prompt.vision:
                vision[number, start:end] = True
        valid = np.arange(vision.shape[1]) < lengths[:, None]
        layout = VisionLayout.from_mask(torch.from_numpy(vision), torch.from_numpy(valid))
        # rows of one length have no padding, whose side then says nothing
        return VisionLayout(
            layout.width, layout.lengths, layout.n_vision, layout.tails, "right", layout.run_rank
        )
