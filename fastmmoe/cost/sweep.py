"""Where a reduced prefill pays, by calculation: other batch sizes and token counts, and what binds."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmmoe.config import ReductionConfig
from fastmmoe.cost.devices import Ceilings
from fastmmoe.cost.prefill_time import OpTime, TimeReport, prefill_time
from fastmmoe.families import Architecture

# vision tokens per sample, and samples
VISION = (256, 512, 1024, 2048, 4096, 8192, 16384)
BATCHES = (1, 2, 4, 8, 16)
# how far the search for a better speedup goes, and how much of the way it goes
_MOST, _SHARE, _WORTH = 32, 0.9, 1.1
_NAMES = {
    "projections": "projections'",
    "attention": "attention",
    "elementwise": "elementwise ops'",
    "prune": "prune stages'",
    "gate": "gates'",
    "experts": "experts'",
    "mlp": "dense MLPs'",
}


@dataclass(frozen=True)
class Outlook:
    """What one prefill's speedup depends on.

    Attributes:
        binds: what most of the reduced prefill's time is spent on, in words.
        batch: the smallest larger batch that comes near to the best speedup; None: none is worth it.
        vision_tokens: vision tokens per sample that give as much at the present batch; None: not within reach.
        speedup: of that batch.
    """

    binds: str
    batch: int | None = None
    vision_tokens: int | None = None
    speedup: float | None = None


def binding(ops: Sequence[OpTime]) -> str:
    """What the longest of the ops takes its time for, in words."""
    seconds: Counter[str] = Counter()
    for op in ops:
        seconds[_words(op)] += op.seconds
    return seconds.most_common(1)[0][0]


def sweep(
    architecture: Architecture, n_text: int, config: ReductionConfig, device: str | Path | Ceilings
) -> dict[int, tuple[float, ...]]:
    """Vision tokens per sample, those of `VISION` -> speedup at each batch size of `BATCHES`."""
    return {
        vision: tuple(_time(architecture, n_text, vision, batch, config, device).speedup for batch in BATCHES)
        for vision in VISION
    }


def outlook(
    architecture: Architecture,
    n_text: int,
    n_vision: int,
    batch: int,
    config: ReductionConfig,
    device: str | Path | Ceilings,
) -> Outlook:
    """What binds a prefill of `batch` samples, and what would give more.

    Batches up to 32 times as large are tried, by doubling, and the smallest is named that gives nine tenths of what
    the best of them would add; then the vision tokens that give as much.
    """

    def speedup(vision: int, samples: int) -> float:
        return _time(architecture, n_text, vision, samples, config, device).speedup

    now = _time(architecture, n_text, n_vision, batch, config, device)
    binds = binding([op for layer in now.per_layer for op in layer.reduced_ops])
    factors = [2**power for power in range(1, _MOST.bit_length())]
    larger = {batch * factor: speedup(n_vision, batch * factor) for factor in factors}
    best = max(larger.values())
    if best < _WORTH * now.speedup:
        return Outlook(binds)
    wanted = now.speedup + _SHARE * (best - now.speedup)
    found = next(samples for samples, value in larger.items() if value >= wanted)
    # in steps of a quarter of a doubling, and in hundreds
    steps = (round(n_vision * 2 ** (step / 4) / 100) * 100 for step in range(1, 4 * len(factors) + 1))
    tokens = next((vision for vision in steps if vision > n_vision and speedup(vision, batch) >= larger[found]), None)
    return Outlook(binds, found, tokens, larger[found])


def _time(
    architecture: Architecture,
    n_text: int,
    n_vision: int,
    batch: int,
    config: ReductionConfig,
    device: str | Path | Ceilings,
) -> TimeReport:
    return prefill_time(architecture, [n_text] * batch, [n_vision] * batch, config, device)


def _words(op: OpTime) -> str:
    if op.binds == "launches":
        return "host's launches"
    if op.binds == "flops":
        return f"{_NAMES[op.name]} FLOPs"
    return f"{_NAMES[op.name]} {'weights' if op.weight_bytes > op.bytes / 2 else 'activations'}"
