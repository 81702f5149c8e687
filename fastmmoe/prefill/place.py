"""A decoder layer's place in a plan, with marks of what ran there."""

from dataclasses import dataclass, field
from itertools import count

import torch

from fastmmoe.config import ExpertChoice

_NUMBERS = count(1)


class Token:
    """Of one forward: when it began, and when it ended."""

    __slots__ = ("began", "ended")

    def __init__(self) -> None:
        self.began, self.ended = next(_NUMBERS), None

    def end(self) -> None:
        self.ended = next(_NUMBERS)

    def marks(self, other: "Token") -> bool:
        """Whether this mark stands for another forward's: its own, or that of one beside it, in another thread."""
        return self.ended is None or self.ended > other.began


NO_FORWARD = Token()
NO_FORWARD.end()


@dataclass(eq=False)
class Place:
    """A decoder layer's place in a plan, and marks of what ran there.

    A list of the layers that ran would grow, and torch.compile makes a graph of each length.

    Attributes:
        behind: how many prune layers stand in front of it.
        stage: number of its stage, if it prunes.
        choice: how its tokens choose experts, if not as the model does.
        gate, experts: of the last forward whose gate gave tokens fewer experts here, and whose experts ran on that
            choice.
        chosen: what the last prefill's gate chose here where the host does not know how many experts that are.
        skips: whether its choice skips experts.
    """

    behind: int
    stage: int | None
    choice: ExpertChoice | None = None
    gate: Token = NO_FORWARD
    experts: Token = NO_FORWARD
    chosen: tuple[Token, torch.Tensor] | None = field(default=None, repr=False)
    skips: bool = field(init=False, repr=False)
    _skip_below: torch.Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        # asked for in place of the numbers, of which torch.compile makes a graph each
        self.skips = self.choice is not None and self.choice.skip_below is not None

    def skip_below(self, device: torch.device) -> torch.Tensor:
        """The least weights of its choice, float32 [2], copied to a device once."""
        if self._skip_below is not None and self._skip_below.device == device:
            return self._skip_below
        least = torch.tensor(self.choice.skip_below, dtype=torch.float32, device=device)
        if type(least) is torch.Tensor:  # and not one of a mode that only looks at shapes
            self._skip_below = least
        return least
