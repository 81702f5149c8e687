"""Every op at one size: its inputs, its contestants, what is right, and how far off who may be.

Inputs are drawn on the CPU: the same numbers, and so the same choices, on every device. A sample is `TEXT` tokens, half
of them in front of one run of vision tokens and half behind it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import naive_ops
import op_peers
import torch
from contestants import OURS, load_peers, our_experts, our_tiles
from op_costs import (
    OpShape,
    attention_cost,
    budget_cost,
    dispatch_cost,
    experts_cost,
    gate_cost,
    prune_cost,
    redundancy_cost,
    routing_cost,
)
from roofline import Stage
from timing import Call
from workload import (
    ERROR_BOUND,
    make_hidden,
    make_routing,
    make_weights,
    reference,
    routing_logits,
    worst_row_error,
)

from fastmmoe_kernels import VisionLayout, choose_experts, gate_routing, last_query_attention, prune_batch, topk_routing
from fastmmoe_kernels.redundancy import window_scores

NAIVE = "naive loops"
TEXT = 100
WINDOW, ALPHA, MERGE_RATIO = 3, 0.5, 0.025
KEEP_RATIO = 0.5 ** (1 / 3)  # half of the tokens are left after three stages
# what float32 leaves of a probability: it takes logits, whose products a GPU adds up a little worse
EXACT = 3e-4
# a logit below 8 in bfloat16 is off by up to 2^-6, and two of them make a weight
ROUNDED = {torch.float32: EXACT, torch.bfloat16: 4e-2}
SCORE_BOUND = 1e-5


def whole(output: object) -> object:
    return output


@dataclass(frozen=True)
class Contestant:
    """One implementation: the call to time, how far off it may be, how its output becomes what `error` takes."""

    run: Call
    bound: float
    read: Callable = whole


@dataclass(frozen=True)
class OpCase:
    """`error` compares with float64; `skipped`: why a peer did not take part."""

    stages: tuple[Stage, ...]
    error: Callable[[object], float]
    contestants: dict[str, Contestant]
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """Where and how large; `tokens` are a sample's."""

    shape: OpShape
    tokens: int
    batch: int
    device: torch.device
    dtype: torch.dtype
    backend: str
    seed: int = 0

    @property
    def total(self) -> int:
        return self.tokens * self.batch

    @cached_property
    def layout(self) -> VisionLayout:
        text = min(TEXT, max(1, self.tokens // 5))
        vision = torch.zeros(self.batch, self.tokens, dtype=torch.bool)
        vision[:, text // 2 : self.tokens - (text - text // 2)] = True
        return VisionLayout.from_mask(vision.to(self.device))

    @property
    def vision(self) -> int:
        return sum(self.layout.n_vision)

    @cached_property
    def logits(self) -> torch.Tensor:
        """float32 [T, E]: neighbouring tokens choose alike."""
        return routing_logits("skewed", self.total, self.shape.experts, self.seed).to(self.device)

    @cached_property
    def importance(self) -> torch.Tensor:
        """float32 [B, n], as an attention row: positive, of sum 1."""
        return self.draw(self.batch, self.tokens, key=1, dtype=torch.float32).softmax(1)

    def draw(self, *size: int, key: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Numbers at unit scale."""
        rng = torch.Generator().manual_seed(1000 * self.seed + key)
        return torch.randn(size, generator=rng).to(self.device, dtype or self.dtype)

    def ours(self, op: Callable, bound: float, read: Callable = whole) -> dict[str, Contestant]:
        """FastMMoE's `op`, a function of the backend; beside the Triton backend, the PyTorch one."""
        found = {OURS: Contestant(lambda: op(self.backend), bound, read)}
        if self.backend != "torch":
            found["torch"] = Contestant(lambda: op("torch"), bound, read)
        return found


def routing_error(output: tuple[torch.Tensor, ...], probs: torch.Tensor, counts: torch.Tensor) -> float:
    """The worst of: a probability below that of the expert that should have been chosen, a rise from a slot to the
    next, an error of a weight; all relative. `probs` float64 [T, E]; `counts` [T]: how many experts.

    So an implementation that rounds may exchange two experts that are as good as equal, and no others.
    """
    *_, ids, weights = output
    ids, weights = ids.long(), weights.double()
    is_on = torch.arange(ids.shape[1], device=ids.device) < counts.unsqueeze(1)
    named = ids.clamp(0, probs.shape[1] - 1)
    times_named = torch.zeros_like(probs).scatter_add_(1, named, is_on.double())
    if (is_on != (ids == named)).any() or (weights[~is_on] != 0).any() or times_named.max() > 1:
        return float("inf")
    chosen = probs.gather(1, named) * is_on
    best = probs.sort(1, descending=True).values[:, : ids.shape[1]]
    want = chosen / chosen.sum(1, keepdim=True)
    shortfall = ((best - chosen) / best)[is_on]
    rise = (chosen.diff() / best[:, 1:])[is_on[:, 1:]]
    # one tensor's maximum: where one of its numbers is NaN, so is it
    return torch.cat((shortfall, rise, (weights / want - 1)[is_on].abs())).max().item()


def slots(at: Setting, mask: torch.Tensor) -> torch.Tensor:
    """[T]: how many experts a token has."""
    return torch.where(mask, at.shape.vision_top_k, at.shape.top_k)


def routing_case(at: Setting) -> OpCase:
    mask, shape = at.layout.vision_mask.flatten(), at.shape
    arguments = (shape.top_k, mask, shape.vision_top_k)
    contestants = at.ours(
        lambda backend: topk_routing(
            at.logits, shape.top_k, vision_mask=mask, vision_top_k=shape.vision_top_k, backend=backend
        )[:2],
        EXACT,
    )
    contestants["transformers router"] = Contestant(lambda: op_peers.topk_routing(at.logits, *arguments), EXACT)
    if at.device.type == "cpu":
        contestants[NAIVE] = Contestant(lambda: naive_ops.topk_routing(at.logits, *arguments), EXACT)
    probs = at.logits.double().softmax(1)
    return OpCase(
        routing_cost(shape, at.total), lambda output: routing_error(output, probs, slots(at, mask)), contestants
    )


def gate_case(at: Setting) -> OpCase:
    mask, shape = at.layout.vision_mask.flatten(), at.shape
    hidden = at.draw(at.total, shape.hidden, key=2)
    weight = at.draw(shape.experts, shape.hidden, key=3) / shape.hidden**0.5
    arguments = (shape.top_k, mask, shape.vision_top_k)
    router = op_peers.load_router(weight, shape.top_k)

    def stock() -> tuple[torch.Tensor, ...]:
        logits, weights, ids = router(hidden)
        return logits, *op_peers.mask_vision(ids, weights, shape.experts, mask, shape.vision_top_k)

    contestants = at.ours(
        lambda backend: gate_routing(
            hidden, weight, shape.top_k, vision_mask=mask, vision_top_k=shape.vision_top_k, backend=backend
        )[:3],
        EXACT,
    )
    contestants["transformers router"] = Contestant(stock, ROUNDED[at.dtype])
    if at.device.type == "cpu":
        contestants[NAIVE] = Contestant(
            lambda: naive_ops.gate_routing(hidden, weight, *arguments), ROUNDED[at.dtype]
        )
    logits = hidden.double() @ weight.double().T
    probs = logits.softmax(1)

    def error(output: tuple[torch.Tensor, ...]) -> float:
        of_logits = (output[0].double() - logits).abs().max()
        of_routing = of_logits.new_tensor(routing_error(output, probs, slots(at, mask)))
        return torch.stack((of_logits, of_routing)).max().item()

    return OpCase(gate_cost(shape, at.total, at.dtype.itemsize), error, contestants)


def budget_case(at: Setting) -> OpCase:
    mask, shape, budget = at.layout.vision_mask.flatten(), at.shape, max(1, at.shape.experts // 4)
    chosen = topk_routing(at.logits, shape.top_k, norm_topk_prob=False, backend="torch")
    sizes = {"num_experts": shape.experts, "budget": budget}
    contestants = at.ours(
        lambda backend: choose_experts(chosen.ids, chosen.weights, mask, **sizes, backend=backend), 0.0
    )
    if at.device.type == "cpu":
        arguments = chosen.ids, chosen.weights, mask
        contestants[NAIVE] = Contestant(lambda: naive_ops.choose_experts(*arguments, **sizes), 0.0)
    want = naive_ops.choose_experts(chosen.ids, chosen.weights.double(), mask, **sizes)
    return OpCase(
        budget_cost(shape, at.total), lambda got: float((got.cpu() != want.cpu()).sum()), contestants
    )


def attention_case(at: Setting) -> OpCase:
    shape, n = at.shape, at.tokens
    queries = at.draw(at.batch, shape.heads, n, shape.head_dim, key=4)
    key = at.draw(at.batch, shape.kv_heads, n, shape.head_dim, key=5)
    query, scale = queries[:, :, -1], shape.head_dim**-0.5
    causal = torch.full((n, n), float("-inf"), dtype=at.dtype, device=at.device).triu(1)
    contestants = at.ours(lambda backend: last_query_attention(query, key, scale=scale, backend=backend), EXACT)
    rounded = ROUNDED[at.dtype]
    contestants["attention map"] = Contestant(lambda: op_peers.attention_map(queries, key, causal, scale), rounded)
    contestants["one row"] = Contestant(lambda: op_peers.attention_row(query, key, scale), rounded)
    if at.device.type == "cpu":
        contestants[NAIVE] = Contestant(lambda: naive_ops.last_query_attention(query, key, scale), rounded)
    grouped = query.double().unflatten(1, (shape.kv_heads, -1))
    want = (grouped @ key.double().mT * scale).softmax(-1).mean((1, 2))
    return OpCase(
        attention_cost(shape, at.batch, n, at.dtype.itemsize),
        lambda got: ((got.double() - want) / want).abs().max().item(),
        contestants,
    )


def redundancy_case(at: Setting) -> OpCase:
    """The op in the form in which prune stages call it, `window_scores`: `window_redundancy` picks the windows' scores
    out of its result, on the host."""
    probs = at.logits.softmax(1).view(at.batch, at.tokens, -1)
    run_rank, importance = at.layout.run_rank, at.importance
    heads = torch.tensor(
        [b * at.tokens + members[0] for b, windows in enumerate(at.layout.windows(WINDOW)) for members in windows],
        device=at.device,
    )

    def naive(probs: torch.Tensor, importance: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        return [
            naive_ops.window_redundancy(probs[b], importance[b], naive_ops.cut_windows(vision, WINDOW), ALPHA)
            for b, vision in enumerate((run_rank >= 0).tolist())
        ]

    def read_naive(samples: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
        return torch.stack([torch.cat(scores) for scores in zip(*samples, strict=True)])

    contestants = at.ours(
        lambda backend: window_scores(probs, importance, run_rank, WINDOW, ALPHA, "hybrid", backend),
        SCORE_BOUND,
        lambda scores: torch.stack([x.flatten()[heads] for x in scores[:3]]),
    )
    contestants[NAIVE] = Contestant(lambda: naive(probs, importance), SCORE_BOUND, read_naive)
    want = read_naive(naive(probs.double().cpu(), importance.double().cpu())).to(at.device)
    return OpCase(
        redundancy_cost(at.shape, at.batch, at.total, at.vision),
        lambda got: (got.double() - want).abs().max().item(),
        contestants,
    )


def prune_case(at: Setting) -> OpCase:
    hidden, residual = (at.draw(at.batch, at.tokens, at.shape.hidden, key=key) for key in (6, 7))
    probs = at.logits.softmax(1).view(at.batch, at.tokens, -1)
    ratios = {"keep_ratio": KEEP_RATIO, "merge_ratio": MERGE_RATIO, "window": WINDOW, "alpha": ALPHA}

    def naive(*tensors: torch.Tensor) -> list[tuple]:
        return [
            naive_ops.prune_sample(*(x[b] for x in tensors), vision, **ratios)
            for b, vision in enumerate(at.layout.vision_mask.tolist())
        ]

    def read_naive(samples: list[tuple]) -> tuple[torch.Tensor, ...]:
        # all samples have as many tokens
        return tuple(
            torch.stack([part if isinstance(part, torch.Tensor) else torch.tensor(part) for part in parts])
            for parts in zip(*samples, strict=True)
        )

    contestants = at.ours(
        lambda backend: prune_batch(
            hidden, residual, probs, at.importance, at.layout, **ratios, strategy="hybrid", merge_method="mlerp",
            backend=backend,
        ),
        ERROR_BOUND[at.dtype],
        lambda pruned: pruned[:4],
    )  # fmt: skip
    contestants[NAIVE] = Contestant(
        lambda: naive(hidden, residual, probs, at.importance), ERROR_BOUND[at.dtype], read_naive
    )
    want = read_naive(naive(*(x.double().cpu() for x in (hidden, residual, probs, at.importance))))

    def error(got: tuple[torch.Tensor, ...]) -> float:
        """infinite where other tokens were kept or merged."""
        streams, choices = [x.cpu() for x in got[:2]], [x.cpu() for x in got[2:]]
        if not all(map(torch.equal, choices, want[2:])):
            return float("inf")
        return worst_row_error(torch.cat(streams), torch.cat(want[:2]))

    index, merged = want[2:]
    lengths = [{members[0]: len(members) for members in sample} for sample in at.layout.windows(WINDOW)]
    from_windows = sum(lengths[b][index[b, slot].item()] for b, slot in merged.nonzero().tolist())
    read = merged.numel() - int(merged.sum()) + from_windows
    return OpCase(
        prune_cost(at.shape, at.total, at.vision, read, merged.numel(), at.dtype.itemsize), error, contestants
    )


def dispatch_case(at: Setting) -> OpCase:
    from fastmmoe_kernels.experts.dispatch import Dispatch, dispatch_pairs

    mask, shape = at.layout.vision_mask.flatten(), at.shape
    ids = topk_routing(
        at.logits, shape.top_k, vision_mask=mask, vision_top_k=shape.vision_top_k, backend="torch"
    ).ids
    want_order, want_ends = naive_ops.dispatch_pairs(ids, shape.experts)
    pairs = len(want_order)
    block_m = our_tiles(shape.block, at.device, at.dtype, ids.numel()).block_m

    def read(dispatch: Dispatch) -> tuple[torch.Tensor, torch.Tensor]:
        """A row stays only where the positions say the same."""
        order, position = dispatch.order[:pairs].long().cpu(), dispatch.position.long().cpu()
        active = (position >= 0).nonzero().flatten()
        from_positions = torch.full((max(pairs, int(position.max()) + 1),), -1).scatter_(0, position[active], active)
        tiles = dispatch.tile_expert.cpu() >= 0
        ends = torch.zeros(shape.experts, dtype=torch.int64).scatter_reduce_(
            0, dispatch.tile_expert.cpu()[tiles].long(), dispatch.tile_end.cpu()[tiles].long(), "amax"
        )
        # an expert without pairs ends where the one before it does
        return torch.where(order == from_positions[:pairs], order, -1), ends.cummax(0).values

    def read_peer(sorted_pairs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        order, ends = sorted_pairs[0][:pairs].cpu(), sorted_pairs[1].long().cpu()
        # its sort may change the order of an expert's pairs
        expert = ids.flatten().long().cpu()[order]
        return order[(expert * ids.numel() + order).argsort()], ends

    def error(got: tuple[torch.Tensor, torch.Tensor]) -> float:
        """How many numbers are wrong."""
        return float((got[0] != want_order).sum() + (got[1] != want_ends).sum())

    contestants = {
        OURS: Contestant(lambda: dispatch_pairs(ids, shape.experts, block_m), 0.0, read),
        "sort and histogram": Contestant(lambda: op_peers.sort_pairs(ids, shape.experts), 0.0, read_peer),
    }
    if at.device.type == "cpu":
        contestants[NAIVE] = Contestant(lambda: naive_ops.dispatch_pairs(ids, shape.experts), 0.0)
    return OpCase(dispatch_cost(shape, at.total, pairs), error, contestants)


def experts_case(at: Setting) -> OpCase:
    """The block of `bench_experts.py`, which says more about it; K_v experts for every token: not all peers know slots
    that are off."""
    block, bound = at.shape.block, ERROR_BOUND[at.dtype]
    weights = make_weights(block, at.dtype, at.device, at.seed)
    hidden = make_hidden(block, at.total, at.dtype, at.device, at.seed + 1)
    routing = make_routing(at.logits.cpu(), at.shape.vision_top_k, at.dtype, at.device)
    implementations = {
        name: our_experts(weights, backend)
        for name, backend in {OURS: at.backend, "torch": "torch"}.items()
        if name == OURS or at.backend != "torch"
    }
    peers, skipped = load_peers(["grouped_mm"], weights, block)
    contestants = {
        name: Contestant(lambda run=run: run(hidden, routing), bound) for name, run in (implementations | peers).items()
    }
    if at.device.type == "cpu":
        arguments = (hidden, weights.gate_up, weights.down, routing.ids, routing.weights)
        contestants[NAIVE] = Contestant(lambda: naive_ops.moe_experts(*arguments), bound)
    want = reference(hidden, weights, routing)
    stages = experts_cost(at.shape, at.total, routing.pairs, routing.active_experts, at.dtype.itemsize)
    return OpCase(stages, lambda got: worst_row_error(got, want), contestants, skipped)


@dataclass(frozen=True)
class Op:
    """`covers`: the public functions of `fastmmoe_kernels` that it stands for, or the one behind them."""

    covers: tuple[str, ...]
    build: Callable[[Setting], OpCase]
    only_triton: bool = False


OPS: Mapping[str, Op] = {
    "routing": Op(("topk_routing",), routing_case),
    "gate": Op(("gate_routing",), gate_case),
    "budget": Op(("choose_experts",), budget_case),
    "attention": Op(("last_query_attention",), attention_case),
    "redundancy": Op(("window_redundancy",), redundancy_case),
    "prune": Op(("prune_batch", "prune_tokens"), prune_case),
    "dispatch": Op(("dispatch_pairs",), dispatch_case, only_triton=True),
    "experts": Op(("moe_experts",), experts_case),
}
