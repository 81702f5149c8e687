"""Random cases of every op, each drawn from one seed: both backends against the float64 reference.

What a case is compared with, and how closely, is that of the op's own tests. `test_fuzz.py` runs them.
"""

import oracle
import torch
from conftest import HAS_GPU

from fastmmoe_kernels.redundancy import STRATEGIES

from . import test_attention as attention
from . import test_budget as budget
from . import test_experts as experts
from . import test_layout as layout
from . import test_prune as pruning
from . import test_redundancy as redundancy
from . import test_routing as routing
from .batches import random_batch

NO_NUMBERS = [float("nan"), float("inf"), float("-inf")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VALUES = ["unit"] * 3 + ["small", "ties", "constant rows", "equal rows", "zero", "denormal", "no numbers"]
LAYOUTS = ["contiguous", "rows", "columns", "transposed"]


def backends(dtype=torch.float32):
    # the interpreter cannot multiply bfloat16
    return ("torch",) if dtype == torch.bfloat16 and not HAS_GPU else ("torch", "triton")


def seed_of(draw):
    return draw.getrandbits(31)


def chance(draw, percent):
    return draw.random() * 100 < percent


def spoil(draw, *tensors):
    """A NaN or an infinity somewhere in some rows of the tensors."""
    for tensor in tensors:
        rows = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)
        for _ in range(draw.randint(0, 2)):
            if rows.numel():
                rows[draw.randrange(len(rows)), draw.randrange(rows.shape[1])] = draw.choice(NO_NUMBERS)


def set_values(draw, x):
    """Change rows of unit scale in place; returns the name of what they are now."""
    kind = draw.choice(VALUES)
    if kind == "small":
        x *= 1e-3
    elif kind == "ties":
        x.round_()
    elif kind == "constant rows":
        x[:] = x[..., :1].clone()
    elif kind == "equal rows" and len(x):
        x[:] = x[:1].clone()
    elif kind == "zero":
        x.zero_()
    elif kind == "denormal":
        x *= 1e-40 if x.dtype == torch.float32 else 2.0**-20
    elif kind == "no numbers":
        spoil(draw, x)
    return kind


# --- routing ----------------------------------------------------------------------------------------------------------


def routing_options(draw, num_tokens):
    """(E, fields of a case) of every kind of gate."""
    size, n_group = draw.choice([(1, 1), (6, 1), (72, 1), (1, 6), (3, 4), (8, 8), (5, 3)])
    topk_group = draw.randint(1, n_group)
    top_k = draw.randint(1, min(8, topk_group * size))
    options = dict(
        scoring=draw.choice(["softmax", "sigmoid"]), norm_topk_prob=chance(draw, 50), n_group=n_group,
        topk_group=topk_group, group_best=draw.choice([None, 1] if size == 1 else [None, 1, 2]),
        routed_scaling_factor=draw.choice([1.0, 2.5]), renormalize=chance(draw, 50),
    )  # fmt: skip
    fields = dict(top_k=top_k, options=options)
    if chance(draw, 50):
        fields["correction_bias"] = routing.make_logits(seed_of(draw), 1, size * n_group)[0]
        if chance(draw, 25):
            fields["correction_bias"][draw.randrange(size * n_group)] += 4.0  # chosen by all tokens
        if chance(draw, 10):
            fields["correction_bias"][draw.randrange(size * n_group)] = draw.choice([float("nan"), float("-inf")])
    for name in ("vision_mask", "padding_mask"):
        if chance(draw, 50):
            fields[name] = routing.make_mask(seed_of(draw), num_tokens, draw.choice([0.0, 0.5, 1.0]))
    if "vision_mask" in fields:
        options["vision_top_k"] = draw.randint(1, top_k)
    return size * n_group, fields


def set_reductions(draw, case, num_tokens, num_experts):
    """Fewer experts by need, and among some; drawn last, so that stored seeds keep the rest of their cases."""
    if case.vision_mask is not None and case.options["n_group"] == 1 and chance(draw, 30):
        case.vision_experts = routing.make_mask(seed_of(draw), num_experts, draw.choice([0.0, 0.2, 0.7, 1.0]))
    if chance(draw, 30):
        case.skip_below = torch.tensor([draw.choice([0.0, 0.1, 0.25, 0.5, float("inf")]) for _ in range(2)])
        if chance(draw, 50):
            case.exempt_mask = routing.make_mask(seed_of(draw), num_tokens, draw.choice([0.0, 0.5, 1.0]))


def topk_routing(draw):
    num_tokens = draw.choice([0, 1, 2, 7, 19])
    num_experts, fields = routing_options(draw, num_tokens)
    logits = routing.make_logits(seed_of(draw), num_tokens, num_experts)
    kind = set_values(draw, logits)
    scale = draw.choice([1, 1, 1, 10])
    logits *= scale
    if chance(draw, 15) and num_tokens:  # one expert of all tokens, or of none
        logits[:, draw.randrange(num_experts)] = draw.choice([1e4, -1e4])
    logits = routing.strided(logits.to(draw.choice(DTYPES)), draw.choice(LAYOUTS))
    ties = kind == "ties" and scale == 1 and "correction_bias" not in fields
    case = routing.Case(logits, **fields)
    set_reductions(draw, case, num_tokens, num_experts)
    for backend in backends():
        routing.check(case, backend, ties=ties)


def gate_routing(draw):
    num_tokens, width, dtype = draw.choice([0, 1, 2, 19, 70]), draw.choice([1, 7, 64, 96]), draw.choice(DTYPES)
    num_experts, fields = routing_options(draw, num_tokens)
    gate = routing.make_gate(seed_of(draw), num_tokens, num_experts, width, dtype, **fields)
    gate.logit_scale = draw.choice([1.0, 0.25])
    ties = chance(draw, 20)
    if ties:  # integers add up to the same logits in any order
        gate.hidden, gate.weight, gate.correction_bias = gate.hidden.sign(), (2 * gate.weight).round(), None
        gate.options["group_best"] = 1  # which other sums of two are equal depends on rounding
    else:
        gate.hidden *= 0.5  # among millions of logits some are large, and the bound is one for unit scale
        set_values(draw, gate.hidden)
        if chance(draw, 10):
            spoil(draw, gate.weight)
        if chance(draw, 50):
            gate.bias = routing.make_logits(seed_of(draw), 1, num_experts, draw.choice(DTYPES))[0]
    gate.hidden, gate.weight = (routing.strided(x, draw.choice(LAYOUTS)) for x in (gate.hidden, gate.weight))
    set_reductions(draw, gate, num_tokens, num_experts)
    for backend in backends(dtype):
        routing.check(gate, backend, ties=ties)


def choose_experts(draw):
    num_tokens, num_experts = draw.choice([0, 1, 2, 19, 300, 600]), draw.choice([1, 6, 33, 72])
    top_k, dtype = draw.randint(1, min(8, num_experts)), draw.choice(DTYPES)
    ids, weights = budget.make_choice(seed_of(draw), num_tokens, num_experts, top_k, dtype)
    mask = routing.make_mask(seed_of(draw), num_tokens, draw.choice([0.0, 0.5, 1.0]))
    if chance(draw, 25):
        weights[:] = weights.round(decimals=1)  # demands tie, and so do sums of them in another order nearly
    if chance(draw, 25) and num_tokens:
        ids[draw.randrange(num_tokens)] = draw.choice([-1, num_experts, 2**31 - 1])
    ids = ids.to(draw.choice([torch.int32, torch.int64]))
    for backend in backends():
        budget.check(ids, weights, mask, backend, num_experts=num_experts, budget=draw.randint(1, num_experts))


# --- attention and experts --------------------------------------------------------------------------------------------


def last_query_attention(draw):
    kv_heads, group = draw.choice([(1, 1), (3, 1), (1, 6), (2, 3), (1, 20)])
    num_keys = draw.choice([0, 1, 2, 5, 17, attention.BLOCK - 1, attention.BLOCK + 1])
    batch, head_dim, dtype = draw.randint(0, 3), draw.choice([1, 7, 16, 65]), draw.choice(DTYPES)
    heads = kv_heads * group
    query, key = attention.make_inputs(seed_of(draw), batch, heads, kv_heads, num_keys, head_dim, dtype)
    set_values(draw, query)
    set_values(draw, key)
    if draw.choice([False, True]):
        query = torch.stack((query, torch.full_like(query, torch.nan)), 1)[:, 0]
        key = attention.LAYOUTS[draw.choice(list(attention.LAYOUTS))](key)
    rows = draw.choice([None, "samples", *(n for n in range(1, heads + 1) if heads % n == 0)])
    mask = None
    if rows == "samples":
        lengths = [draw.randint(0, num_keys) for _ in range(batch)]
        mask = attention.make_mask(lengths, num_keys, draw.choice(["left", "right"]))
    elif rows is not None and batch:
        mask = attention.make_head_mask(seed_of(draw), batch, rows, num_keys, draw.choice([0.1, 0.5, 1.0]))
    sinks = None
    if chance(draw, 40):
        sinks = attention.make_sinks(seed_of(draw), heads, draw.choice(DTYPES))
        if chance(draw, 20):
            spoil(draw, sinks)
    for backend in backends(dtype):
        attention.check(query, key, backend, mask, sinks)


def moe_experts(draw):
    options, dtype = dict(draw.choice(experts.ACTIVATIONS)), draw.choice(DTYPES)
    num_tokens, num_experts, top_k = draw.choice([0, 1, 2, 17]), draw.choice([1, 3, 6]), draw.randint(0, 3)
    # the sum of a few cancelling products is no matter for a 16-bit type
    width, intermediate = draw.choice([8, 40, 97]), draw.choice([32, 70] + [5] * (dtype == torch.float32))
    sizes = (num_tokens, num_experts, top_k, width, intermediate)
    case = experts.make_case(*sizes, dtype=dtype, seed=seed_of(draw), **options)
    which = draw.choice(["random"] * 4 + ["one", "none", "same"])
    if which == "one":
        case.ids[:] = draw.randrange(num_experts)
    elif which == "none":
        case.ids[:] = draw.choice([-1, num_experts])
    elif which == "same":
        case.ids[:] = case.ids[:, :1].clone()
    case.ids, case.weights = case.ids.to(draw.choice([torch.int32, torch.int64])), case.weights.to(draw.choice(DTYPES))
    if options.get("activation") == "relu2":
        experts.lift(case)
    else:
        case.options["interleaved"] = chance(draw, 30)
    for name, size in (("gate_up_bias", case.gate_up_proj.shape[1]), ("down_bias", width)):
        if chance(draw, 30):
            bias = torch.randn(num_experts, size, generator=torch.Generator().manual_seed(seed_of(draw)))
            case.options[name] = bias.to(draw.choice([dtype, torch.float32]))
    if chance(draw, 25):
        spoil(draw, case.hidden, case.weights)
    if chance(draw, 10):
        spoil(draw, case.gate_up_proj, case.down_proj)
    if chance(draw, 10) and num_tokens:
        case.hidden[draw.randrange(num_tokens)] = 0.0
    case.hidden = routing.strided(case.hidden, draw.choice(LAYOUTS))
    case.gate_up_proj, case.down_proj = (
        experts.laid_out(x, draw.choice(experts.LAYOUTS)) for x in (case.gate_up_proj, case.down_proj)
    )
    want = experts.expected(case)
    lost = torch.zeros(num_tokens, dtype=torch.bool)
    if chance(draw, 30):
        max_pairs = max(1, len(experts.active_pairs(case)) + draw.randint(-10, 10))
        lost = experts.lost_tokens(case, max_pairs)
        case.options["max_pairs"] = max_pairs
    for backend in backends(dtype):
        got = case.run(backend)
        assert got[lost].isnan().all()
        regular = want.isfinite().all(-1) & ~lost
        experts.assert_near(got[regular], want[regular], dtype)
        odd = ~regular & ~lost
        assert torch.equal(got[odd].isnan(), want[odd].isnan())
        assert torch.equal(got[odd].isinf(), want[odd].isinf())


# --- windows and pruning ----------------------------------------------------------------------------------------------


def scored_batch(draw):
    """Up to three samples, whose scores may be zero or no numbers; and whether these tie in any precision."""
    ties = chance(draw, 30)
    lengths = [draw.randint(0, 9) for _ in range(draw.randint(1, 2))]
    batch = random_batch(
        seed_of(draw), lengths, draw.choice([0.0, 0.5, 0.9, 1.0]), draw.choice(["left", "right"]),
        experts=draw.choice([2, 6, 9] if ties else [1, 2, 6, 9]), features=draw.choice([1, 9, 40]), ties=ties,
    )  # fmt: skip
    batch.padding_side = batch.layout.padding_side  # either, where no sample or all of one is padding
    if chance(draw, 20):
        batch.probs[routing.make_mask(seed_of(draw), batch.valid.numel(), 0.5).view_as(batch.valid)] = 0.0
    scale = draw.choice([1.0] * 7 + [0.0, 1e-3, 1e-40])
    batch.importance *= scale
    if chance(draw, 20):
        spoil(draw, batch.probs, batch.importance)
        batch.importance.abs_()
    return batch, ties and scale in (0.0, 1.0)


def scoring(draw):
    return dict(window=draw.randint(1, 5), alpha=draw.choice([0.0, 0.3, 1.0]), strategy=draw.choice(STRATEGIES))


def window_redundancy(draw):
    (batch, _), options = scored_batch(draw), scoring(draw)
    for backend in backends():
        redundancy.check(batch, backend, **options)


def prune_batch(draw):
    while True:
        (batch, ties), options = scored_batch(draw), scoring(draw)
        options["keep_ratio"] = draw.choice([0.01, 0.3, 0.5, 0.9, 1.0])
        options["merge_ratio"] = draw.choice([0.0, 0.1, 0.5, 1.0])
        arguments = (batch.probs, batch.importance, batch.vision, batch.valid)
        margins = oracle.selection_margin(*(x.numpy() for x in arguments), **options)
        # float32 may decide closer calls otherwise
        is_clear = all((margin > pruning.MARGIN).all() for margin in margins)
        if is_clear or ties and pruning.ties_in_any_precision(**options):
            break
    options["merge_method"] = draw.choice(pruning.MERGE_METHODS)
    dtype, streams = draw.choice(DTYPES), (batch.hidden, batch.residual)
    for stream in streams:
        set_values(draw, stream)
        stream[:] = stream.to(dtype).float()
        if chance(draw, 30):
            spoil(draw, stream)
    if chance(draw, 25):
        batch.hidden = batch.hidden.mT.contiguous().mT
        batch.residual = torch.cat((batch.residual, batch.residual + torch.nan), -1)[..., : batch.residual.shape[-1]]
    source = pruning.random_source(batch) if chance(draw, 50) else None
    rtol = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    is_number = (batch.probs.sum(-1) + batch.importance)[batch.vision].isfinite().all()
    which = draw.choice(["ratio"] * 3 + ["targets", "redundancy"]) if is_number else "ratio"
    targets = [draw.randint(0, n) for n in batch.layout.n_vision]
    for backend in backends(dtype):
        if which == "targets":
            pruning.check_targets(batch, backend, targets)
        elif which == "redundancy":
            pruning.check_keep_by_redundancy(batch, backend, **options)
        else:
            pruning.check(batch, backend, dtype, rtol=rtol, source=source, **options)


# --- layout -----------------------------------------------------------------------------------------------------------


def vision_layout(draw):
    """On the host alone: there is one implementation, compared with loops and with the reference."""
    kinds = [layout.TEXT, layout.VISION]
    samples = [draw.choices(kinds, k=draw.randint(0, 14)) for _ in range(draw.randint(1, 4))]
    width = max(map(len, samples)) + draw.randint(0, 2)
    side = draw.choice(["left", "right"])
    pads = [[layout.PADDING] * (width - len(sample)) for sample in samples]
    rows = [pad + sample if side == "left" else sample + pad for pad, sample in zip(pads, samples, strict=True)]
    keep_ratio, merge_ratio = (draw.choice([1 / 3, 0.5, 1.0, 1 - draw.random()]) for _ in range(2))
    window = draw.randint(1, 6)
    layout.check_layout(rows, side, window, draw.choice([False, True]))
    layout.check_counts(rows, keep_ratio, merge_ratio, window)
    runs = [draw.randint(1, 2000) for _ in range(draw.randint(0, 5))]
    layout.check_plan(runs, keep_ratio, merge_ratio, window)


OPS = {
    op.__name__: op
    for op in (
        topk_routing, gate_routing, choose_experts, last_query_attention, moe_experts, window_redundancy, prune_batch,
        vision_layout,
    )
}  # fmt: skip
