"""What the experts are given to do: weights and tokens at unit scale, and routings of known skew from a fixed seed."""

from dataclasses import dataclass

import torch
from roofline import ExpertsShape

ROUTINGS = ("uniform", "skewed")
# the skewed routing: how much more popular experts are chosen, how alike neighbouring tokens are
ZIPF, TOPIC = 0.3, 0.7
TOPIC_TOKENS, TOPIC_RANK = 16, 16


def routing_logits(kind: str, tokens: int, experts: int, seed: int) -> torch.Tensor:
    """float32 [tokens, experts] on the CPU.

    "uniform": independent of each other, every expert as likely as any. "skewed": what routers do to an image: some
    experts are chosen more often than others (Zipf's law over experts in a random order), and runs of neighbouring
    tokens share a topic that a few experts serve.
    """
    if kind not in ROUTINGS:
        raise ValueError(f"routing: expected one of {', '.join(ROUTINGS)}, got {kind!r}")
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=rng)
    if kind == "skewed":
        rank = 1 + torch.randperm(experts, generator=rng)
        topics = torch.randn(-(-tokens // TOPIC_TOKENS), TOPIC_RANK, generator=rng)
        directions = torch.randn(TOPIC_RANK, experts, generator=rng) / TOPIC_RANK**0.5
        affinity = (topics @ directions).repeat_interleave(TOPIC_TOKENS, 0)[:tokens]
        logits += TOPIC * affinity - ZIPF * rank.log()
    return logits


@dataclass(frozen=True)
class Routing:
    """Experts of every token, in the types that the different implementations take.

    Attributes:
        ids, ids64: int32 and int64 [T, K]; `experts` in a slot that is off.
        weights, weights16: float32 and the tokens' dtype [T, K], the same values.
        counts: pairs per expert.
    """

    ids: torch.Tensor
    ids64: torch.Tensor
    weights: torch.Tensor
    weights16: torch.Tensor
    counts: tuple[int, ...]

    @property
    def pairs(self) -> int:
        return sum(self.counts)

    @property
    def active_experts(self) -> int:
        return sum(count > 0 for count in self.counts)

    @property
    def imbalance(self) -> float:
        """Pairs of the busiest expert per pair of the mean expert."""
        return max(self.counts) * len(self.counts) / self.pairs


def make_routing(
    logits: torch.Tensor, top_k: int, dtype: torch.dtype, device: torch.device, slots: int | None = None
) -> Routing:
    """The `top_k` experts of largest logit, weights summing to 1. With `slots` > `top_k`, the other slots are off."""
    tokens, experts = logits.shape
    values, ids = logits.topk(top_k)
    # one value for all: those who take the tokens' dtype must not compute something else
    weights = values.softmax(-1).to(dtype).float()
    counts = tuple(ids.flatten().bincount(minlength=experts).tolist())
    if slots is not None:
        ids = torch.cat((ids, ids.new_full((tokens, slots - top_k), experts)), 1)
        weights = torch.cat((weights, weights.new_zeros(tokens, slots - top_k)), 1)
    ids, weights = ids.to(device), weights.to(device)
    return Routing(ids.int(), ids, weights, weights.to(dtype), counts)


@dataclass(frozen=True)
class Weights:
    """gate_up [E, 2I, H] and down [E, H, I]: every product with them keeps the variance."""

    gate_up: torch.Tensor
    down: torch.Tensor


def make_weights(shape: ExpertsShape, dtype: torch.dtype, device: torch.device, seed: int) -> Weights:
    rng = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, columns: int) -> torch.Tensor:
        weight = torch.randn(shape.experts, rows, columns, generator=rng, dtype=dtype, device=device)
        return weight.div_(columns**0.5)

    return Weights(draw(2 * shape.intermediate, shape.hidden), draw(shape.hidden, shape.intermediate))


def make_hidden(shape: ExpertsShape, tokens: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """[tokens, H]."""
    rng = torch.Generator(device).manual_seed(seed)
    return torch.randn(tokens, shape.hidden, generator=rng, dtype=dtype, device=device)


def reference(hidden: torch.Tensor, weights: Weights, routing: Routing) -> torch.Tensor:
    """What is right, in float64, expert by expert: [T, H]."""
    out = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for expert, count in enumerate(routing.counts):
        if count:
            token, slot = (routing.ids64 == expert).nonzero(as_tuple=True)
            gate, up = (hidden[token].double() @ weights.gate_up[expert].double().T).chunk(2, -1)
            y = (gate * torch.sigmoid(gate) * up) @ weights.down[expert].double().T
            out.index_add_(0, token, y * routing.weights[token, slot].double().unsqueeze(1))
    return out


def worst_row_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest relative error of a token's row: one wrong token among thousands shows. NaN if there is one."""
    error = (got.double() - want).norm(dim=-1) / want.norm(dim=-1)
    return error.max().item()


# what the dtype's rounding explains, and no wrong row stays under
ERROR_BOUND = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
