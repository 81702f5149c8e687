"""What one decoder layer does to a batch: the FLOPs, bytes and launches of each of its ops.

FLOPs are those of `fastmmoe.flops`: they add up to a layer's. Bytes are, but for elementwise ops, those that any
implementation must move: an op's weights once, what it reads and what it writes. Of experts only those are read that a
token is expected to come to, if routing is uniform and tokens choose by themselves; real routing is skewed and touches
fewer. What stays between an op's kernels counts as well where they are several, as this package's are: an expert's
inner numbers, and its outputs before they are added up.

Elementwise ops are what stock transformers (5.23) runs in eager mode, on both sides of a comparison. Of a layer with
norms of queries and keys that is, in 16 bits and per number, operation by operation, what each reads and writes:

- RMSNorm: to float32 (2 + 4), square (4 + 4), mean (4), scale (4 + 4), back (4 + 2), times its weight (2 + 2): 36
  bytes and 8 launches, over the hidden size in front of attention and of the MLP, and over queries and keys.
- Rotary embedding of queries and keys: times cosine, negated half and concatenation, times sine, sum: 20 bytes, 5
  launches.
- A residual sum: 6 bytes, 1 launch, twice.

With hidden size 2,048, queries of 4,096 and keys of 512 numbers: 430 KB per token in 44 launches. Attention without
norms of queries and keys does less; MLA has norms of what it writes them out from, and turns a part of them. What else
a family has (gates, more norms, all of a linear attention or a state space) is left out. Fused kernels move less than
eager mode does. Launches of the other ops are counted on the same layer, with grouped GEMMs for the experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fastmmoe.families.architecture import Architecture, Layer

# launches of an op in a stock layer
PROJECTIONS, ATTENTION, GATE, EXPERTS, MLP = 4, 1, 5, 16, 5
NORM, ROTARY, RESIDUAL = 8, 5, 1
# of a prune stage: one row of attention, scores, the choice, and the shorter sequence with all that follows it
PRUNE = 16
# bytes of a number in float32, in which norms and softmax are computed
FLOAT = 4


@dataclass(frozen=True)
class Op:
    """One op of a layer, over a batch.

    Attributes:
        name: projections, attention, elementwise, prune, gate, experts or mlp (dense, or the shared experts).
        flops: a multiply-add counts 2.
        bytes: read plus written.
        weight_bytes: those of them that are weights.
        launches: kernels.
    """

    name: str
    flops: float
    bytes: float
    weight_bytes: float
    launches: int


def layer_ops(
    architecture: Architecture,
    layer: Layer,
    text: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    text_pairs: int,
    vision_pairs: int,
    vision_experts: int | None,
    prunes: bool,
    itemsize: int,
) -> tuple[Op, ...]:
    """The ops of a layer in their order.

    Args:
        text: text tokens per sample.
        before, after: vision tokens per sample that its mixer and its MLP see.
        text_pairs, vision_pairs: pairs of a token and an expert, over all samples.
        vision_experts: how many different experts vision tokens share; None: as many as they choose.
        prunes: whether a prune stage is in the layer.
        itemsize: bytes per number.
    """
    hidden, mixer = architecture.hidden_size, layer.mixer
    mixed, left = sum(text) + sum(before), sum(text) + sum(after)
    has_mixer, has_mlp = bool(mixer.weights), bool(layer.mlp.weights)
    ops = [_elementwise(layer, hidden, mixed, left, itemsize)]
    if has_mixer:
        inputs = mixer.query + mixer.key + mixer.value
        projections = 2.0 * mixed * mixer.weights
        rows = mixed * (2 * hidden + inputs + mixer.output)
        weights = itemsize * mixer.weights
        ops.append(Op("projections", projections, weights + itemsize * rows, weights, PROJECTIONS))
        mixing = sum(mixer.flops(t + b) for t, b in zip(text, before, strict=True)) - projections
        ops.append(Op("attention", mixing, itemsize * mixed * (inputs + mixer.output), 0.0, ATTENTION))
    if prunes:
        # keys and hidden states are read for scores, the shorter sequence is written
        moved = mixed * (mixer.key + hidden) + 2 * left * hidden
        ops.append(Op("prune", 0.0, itemsize * moved, 0.0, PRUNE))
    if has_mlp:
        ops += _mlp(architecture, layer, (sum(text), text_pairs), (sum(after), vision_pairs), vision_experts, itemsize)
    return tuple(ops)


def expected_experts(num_experts: int, draws: Sequence[tuple[int, int]]) -> float:
    """Experts that at least one token is expected to come to.

    Args:
        draws: (tokens, experts of all of them); each has as many, every set is equally likely, and tokens choose by
            themselves.
    """
    missed = 1.0
    for tokens, pairs in draws:
        if tokens:
            missed *= (1.0 - pairs / tokens / num_experts) ** tokens
    return num_experts * (1.0 - missed)


def _distinct_experts(
    num_experts: int, draws: Sequence[tuple[int, int]], vision_draw: tuple[int, int], vision_experts: int | None
) -> float:
    """Experts that at least one token is expected to come to; vision tokens to some of those they share."""
    if vision_experts is None or vision_draw not in draws:
        return expected_experts(num_experts, draws)
    shared = expected_experts(vision_experts, [vision_draw])
    others = expected_experts(num_experts, [draw for draw in draws if draw is not vision_draw])
    return others + shared * (1.0 - others / num_experts)


def _elementwise(layer: Layer, hidden: int, mixed: int, left: int, itemsize: int) -> Op:
    casts = 2 * (itemsize + FLOAT) if itemsize != FLOAT else 0
    norm = casts + 5 * FLOAT + 2 * itemsize
    rotary, residual = 10 * itemsize, 3 * itemsize
    norm_launches = NORM if casts else NORM - 2
    moved, launches = 0, 0
    if layer.mixer.weights:
        around = hidden * (norm + residual)
        moved += mixed * (around + layer.mixer.normed * norm + layer.mixer.turned * rotary)
        launches += (1 + layer.mixer.norms) * norm_launches + RESIDUAL
        launches += 2 * ROTARY if layer.mixer.turned else 0
    if layer.mlp.weights:
        moved += left * hidden * (norm + residual)
        launches += norm_launches + RESIDUAL
    return Op("elementwise", 0.0, moved, 0.0, launches)


def _mlp(
    architecture: Architecture,
    layer: Layer,
    text_draw: tuple[int, int],
    vision_draw: tuple[int, int],
    vision_experts: int | None,
    itemsize: int,
) -> list[Op]:
    hidden, num_experts, tokens = architecture.hidden_size, architecture.num_experts, text_draw[0] + vision_draw[0]
    if layer.vision_mlp is None:
        parts = [(layer.mlp, [text_draw, vision_draw])]
    else:
        parts = [(layer.mlp, [text_draw]), (layer.vision_mlp, [vision_draw])]
    ops = []
    gate = hidden * num_experts if layer.mlp.expert else 0
    if gate:
        # logits are written, read as float32 by the softmax, and its values by the choice
        choice = num_experts * (2 * itemsize + 4 * FLOAT)
        weights = itemsize * len(parts) * gate
        ops.append(Op("gate", 2.0 * tokens * gate, weights + tokens * (itemsize * hidden + choice), weights, GATE))
        multiplied, weights, moved = 0.0, 0.0, 0
        for mlp, draws in parts:
            rows, pairs = (sum(counts) for counts in zip(*draws, strict=True))
            multiplied += 2.0 * pairs * mlp.expert
            weights += itemsize * _distinct_experts(num_experts, draws, vision_draw, vision_experts) * mlp.expert
            # what goes in and comes out, and between the kernels what is written and read again
            moved += 2 * rows * mlp.expert_hidden + 2 * pairs * (mlp.expert_width + mlp.expert_hidden)
        ops.append(Op("experts", multiplied, weights + itemsize * moved, weights, EXPERTS * len(parts)))
    if rest := layer.mlp.weights - gate:
        # shared experts, or the whole of a dense MLP: one and the same for text and vision
        weights, moved = itemsize * rest, 2 * tokens * (hidden + layer.mlp.width)
        ops.append(Op("mlp", 2.0 * tokens * rest, weights + itemsize * moved, weights, MLP))
    return ops
