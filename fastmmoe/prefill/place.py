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
    """

    behind: int
    stage: int | None
    choice: ExpertChoice | None = None
    gate: Token = NO_FORWARD
    experts: Token = NO_FORWARD
    chosen: tuple[Token, torch.Tensor] | None = field(default=None, repr=False)
    _skip_below: torch.Tensor | None = field(default=None, repr=False)

    def skip_below(self, device: torch.device) -> torch.Tensor | None:
        """The least weights of its choice, float32 [2], copied to a device once."""
        if self.choice.skip_below is None:
            return None
        if self._skip_below is None or self._skip_below.device != device:
            self._skip_below = torch.tensor(self.choice.skip_below, dtype=torch.float32).to(device)
        return self._skip_below
