"""A decoder layer's place in a plan, with marks of what ran there."""

from dataclasses import dataclass
from itertools import count

_NUMBERS = count(1)


class Token:
    """Of one forward; later ones have higher numbers."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = next(_NUMBERS)


NO_FORWARD = Token()


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
