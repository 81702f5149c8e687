"""How fast the experts could be: operations, bytes, and the time they take at a device's ceilings. Arithmetic only.

The block is three kernels, one after the other: gate_up, down and combine. Its floor is the sum of their floors, and
the floor of a kernel is the time for its operations or the time for its bytes, whichever is longer. A byte counts once
however often it is read: weights of every expert that has a token, tokens, and what the kernels hand on. Slot ids and
weights (8 bytes per slot) are left out.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertsShape:
    """Sizes of an experts block: H, I, E, and the numbers of experts per token to compare, largest first."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: tuple[int, ...]

    def flops(self, pairs: float) -> float:
        """Multiplications and additions of both GEMMs; a pair is a token with one of its experts."""
        return 6.0 * self.hidden * self.intermediate * pairs


@dataclass(frozen=True)
class Ceilings:
    """What a device does at best: operations per second in a large GEMM, bytes per second read plus written."""

    flops: float
    bytes: float
    source: str


ESTIMATE = Ceilings(780e12, 4.3e12, "estimate, no GPU: 780 TFLOP/s dense bf16 and 4.3 TB/s, an H200")


@dataclass(frozen=True)
class Stage:
    """Operations and bytes of one kernel."""

    name: str
    flops: float
    bytes: float

    def seconds(self, ceilings: Ceilings, padding: float = 1.0) -> float:
        """The floor; `padding` is rows computed per row needed."""
        return max(self.flops * padding / ceilings.flops, self.bytes / ceilings.bytes)


def expert_stages(
    shape: ExpertsShape, tokens: int, pairs: int, active_experts: int, itemsize: int
) -> tuple[Stage, Stage, Stage]:
    """gate_up, down and combine for `pairs` pairs of `tokens` tokens, `active_experts` of the experts having one."""
    matrix = shape.hidden * shape.intermediate
    act, rows, hidden = pairs * shape.intermediate, pairs * shape.hidden, tokens * shape.hidden
    return (
        Stage("gate_up", 4.0 * matrix * pairs, itemsize * (2 * matrix * active_experts + hidden + act)),
        Stage("down", 2.0 * matrix * pairs, itemsize * (matrix * active_experts + act + rows)),
        # its additions are nothing beside its bytes
        Stage("combine", 0.0, itemsize * (rows + hidden)),
    )


def roofline_seconds(stages: Iterable[Stage], ceilings: Ceilings, padding: float = 1.0) -> float:
    """The block's floor."""
    return sum(stage.seconds(ceilings, padding) for stage in stages)


def padding_factor(counts: Iterable[int], block_m: int) -> float:
    """Rows in tiles of `block_m` per row that holds a pair; `counts` are pairs per expert."""
    counts = list(counts)
    return sum(-(-count // block_m) * block_m for count in counts) / sum(counts)
