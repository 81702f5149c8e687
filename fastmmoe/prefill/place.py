"""A decoder layer's place in a plan, with marks of what ran there."""

from dataclasses import dataclass
from itertools import count

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
        gate, experts: of the last forward whose gate gave vision tokens fewer experts here, and whose experts ran on
            that choice.
    """

    behind: int
    stage: int | None
    gate: Token = NO_FORWARD
    experts: Token = NO_FORWARD
