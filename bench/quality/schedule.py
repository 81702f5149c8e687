"""What changes over the training: learning rates, the number of digits in a picture, the size of a batch."""

WARMUP = 30  # steps
UNFREEZE = 0.5  # of the second phase: from here on the vision tower learns again


def rate(step: int, steps: int, decay_from: float) -> float:
    """Factor of the learning rates: a short warm-up, 1, then linear to 0 from the share `decay_from` of the steps."""
    return min(1.0, (step + 1) / WARMUP, (1 - step / steps) / (1 - decay_from))


def digits(step: int) -> tuple[int, int]:
    """Least and most digits per picture: few at first, so that reading a cell can be learned before counting."""
    return (1, 3) if step < 216 else (2, 5) if step < 500 else (3, 7)


def pictures(step: int, steps: int, most: int) -> int:
    """Pictures per batch: half at first, when more steps are worth more than less noise."""
    return most // 2 if step < 0.9 * steps else most
