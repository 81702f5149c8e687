"""What changes over the training: the size of the pages and of the batches, and the learning rates."""

from dataclasses import dataclass

from pages.words import SIDE

WARMUP = 30  # steps


@dataclass(frozen=True)
class Stage:
    """A number of steps on pages of one size.

    Attributes:
        task: "answer" questions about ideal vision tokens, "read" what vision tokens show, "place": read whole pages,
            "join": answer questions about pictures.
        side: of a page, in vision tokens.
        pages: per step.
        rate: factor of the learning rates at its start and at its end, linear between.
        made_up: of the words on pages, halves put together at random: or answers are words that are known by heart.
    """

    task: str
    steps: int
    side: int
    pages: int
    rate: tuple[float, float]
    made_up: bool = False


STAGES = (
    Stage("answer", 2400, 8, 16, (1.0, 1.0)),
    Stage("answer", 600, 12, 16, (1.0, 0.9)),
    Stage("answer", 1200, SIDE, 16, (0.9, 0.3)),
    Stage("read", 2200, 6, 32, (1.0, 0.4)),
    Stage("place", 400, SIDE, 8, (1.0, 0.5)),
    Stage("join", 600, SIDE, 8, (0.5, 5 / 22)),
    Stage("join", 1250, SIDE, 8, (0.4, 0.0), made_up=True),
)


def rate(stage: Stage, step: int) -> float:
    """Factor of the learning rates at a step of a stage."""
    first, last = stage.rate
    return min(1.0, (step + 1) / WARMUP) * (first + (last - first) * step / stage.steps)
