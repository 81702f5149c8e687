"""What each op has to do at least: operations, and bytes of inputs read once and outputs written once. Arithmetic only.

A device does it no faster than `Stage.seconds` of its ceilings. The few additions of ops that only move numbers are
left out.
"""

from dataclasses import dataclass

from roofline import ExpertsShape, Stage, expert_stages


@dataclass(frozen=True)
class OpShape:
    """Sizes of a model's layer: H, I, E, K, K_v, and the heads of its attention."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    vision_top_k: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def block(self) -> ExpertsShape:
        return ExpertsShape(self.name, self.hidden, self.intermediate, self.experts, (self.top_k, self.vision_top_k))


# what `bytes` is in each function below; T tokens of B samples, s bytes per number of the model, M vision tokens
FORMULAS = {
    "routing": "4TE logits + T mask + 8TK ids and weights",
    "gate": "s(TH + EH) tokens and gate + T mask + 4TE logits + 8TK ids and weights; 2THE operations",
    "budget": "8TK ids and weights + T mask + E chosen",
    "attention": "s(B Hq D + B Hkv n D) query and keys + 4Bn row; 2 B Hq n D operations",
    "redundancy": "4ME probs + 4M importance + 4T ranks + 12T scores + 4B counts",
    "prune": "4ME probs + 4M importance + 4T ranks + 2sH(rows read + rows written) + 14 per row written",
    "dispatch": "4TK ids + 4TK positions + 4P order, P pairs",
    "experts": "gate_up, down and combine of roofline.py; 6HI operations per pair",
}


def routing_cost(shape: OpShape, tokens: int) -> tuple[Stage, ...]:
    return (Stage("routing", 0.0, 4 * tokens * shape.experts + tokens + 8 * tokens * shape.top_k),)


def gate_cost(shape: OpShape, tokens: int, itemsize: int) -> tuple[Stage, ...]:
    operands = itemsize * shape.hidden * (tokens + shape.experts)
    size = operands + tokens + 4 * tokens * shape.experts + 8 * tokens * shape.top_k
    return (Stage("gate", 2.0 * tokens * shape.hidden * shape.experts, size),)


def budget_cost(shape: OpShape, tokens: int) -> tuple[Stage, ...]:
    return (Stage("budget", 0.0, 8 * tokens * shape.top_k + tokens + shape.experts),)


def attention_cost(shape: OpShape, batch: int, keys: int, itemsize: int) -> tuple[Stage, ...]:
    operands = itemsize * batch * shape.head_dim * (shape.heads + shape.kv_heads * keys)
    return (Stage("attention", 2.0 * batch * shape.heads * keys * shape.head_dim, operands + 4 * batch * keys),)


def redundancy_cost(shape: OpShape, batch: int, tokens: int, vision: int) -> tuple[Stage, ...]:
    return (Stage("redundancy", 0.0, 4 * vision * (shape.experts + 1) + 16 * tokens + 4 * batch),)


def prune_cost(
    shape: OpShape, tokens: int, vision: int, rows_read: int, rows_written: int, itemsize: int
) -> tuple[Stage, ...]:
    """A row is a token of one stream; both have as many. 14: index, merged, valid and run rank."""
    streams = 2 * itemsize * shape.hidden * (rows_read + rows_written)
    return (Stage("prune", 0.0, 4 * vision * (shape.experts + 1) + 4 * tokens + streams + 14 * rows_written),)


def dispatch_cost(shape: OpShape, tokens: int, pairs: int) -> tuple[Stage, ...]:
    return (Stage("dispatch", 0.0, 8 * tokens * shape.top_k + 4 * pairs),)


def experts_cost(
    shape: OpShape, tokens: int, pairs: int, active_experts: int, itemsize: int
) -> tuple[Stage, ...]:
    """Here a stage is a kernel, and what one hands to the next counts."""
    return expert_stages(shape.block, tokens, pairs, active_experts, itemsize)
