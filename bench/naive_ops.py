"""The ops as the method's text defines them: Python loops over samples, tokens, experts and windows.

What `bench_ops.py` times the ops against, and in float64 what windows and prune stages are compared with. They take
what the ops take, with the options of the method's official scripts, and prune stages one sample at a time.
"""

import torch


def topk_routing(
    logits: torch.Tensor,  # [T, E]
    top_k: int,
    vision_mask: torch.Tensor,  # bool [T]
    vision_top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int64 and weights, [T, K]: of the largest softmax probabilities, which sum to 1; a slot that is off holds
    (E, 0)."""
    num_tokens, num_experts = logits.shape
    ids = torch.full((num_tokens, top_k), num_experts)
    weights = logits.new_zeros(num_tokens, top_k, device="cpu")
    for token, is_vision in enumerate(vision_mask.tolist()):
        probs = logits[token].softmax(0).tolist()
        # ties go to the lower id, as sorting is stable
        chosen = sorted(range(num_experts), key=lambda expert: -probs[expert])[: vision_top_k if is_vision else top_k]
        total = sum(probs[expert] for expert in chosen)
        for slot, expert in enumerate(chosen):
            ids[token, slot], weights[token, slot] = expert, probs[expert] / total
    return ids.to(logits.device), weights.to(logits.device)


def gate_routing(
    hidden: torch.Tensor,  # [T, H]
    weight: torch.Tensor,  # [E, H]
    top_k: int,
    vision_mask: torch.Tensor,  # bool [T]
    vision_top_k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [T, E], and what `topk_routing` makes of them."""
    logits = torch.stack([weight @ x for x in hidden])
    return logits, *topk_routing(logits, top_k, vision_mask, vision_top_k)


def choose_experts(
    ids: torch.Tensor,  # [T, K]
    weights: torch.Tensor,  # [T, K]
    vision_mask: torch.Tensor,  # bool [T]
    num_experts: int,
    budget: int,
) -> torch.Tensor:
    """bool [E]: the experts for which vision tokens' weights to the power of 8 have the largest sums."""
    demand = [0.0] * num_experts
    rows = zip(ids.tolist(), weights.tolist(), vision_mask.tolist(), strict=True)
    for chosen, asked in ((chosen, asked) for chosen, asked, is_vision in rows if is_vision):
        for expert, weight in zip(chosen, asked, strict=True):
            demand[expert] += weight**8
    best = sorted(range(num_experts), key=lambda expert: -demand[expert])[:budget]
    return torch.tensor([expert in best for expert in range(num_experts)])


def last_query_attention(
    query: torch.Tensor,  # [B, Hq, D]
    key: torch.Tensor,  # [B, Hkv, n, D]
    scale: float,
) -> torch.Tensor:
    """[B, n]: every head's softmax over the keys, one head after the other; their mean."""
    rows = []
    group = query.shape[1] // key.shape[1]
    for sample in range(len(query)):
        heads = [(key[sample, head // group] @ q * scale).softmax(0) for head, q in enumerate(query[sample])]
        rows.append(sum(heads) / len(heads))
    return torch.stack(rows)


def cut_windows(vision: list[bool], window: int) -> list[list[int]]:
    """Positions of one sample's vision tokens, cut into windows that do not cross the end of a run."""
    windows: list[list[int]] = []
    for position, is_vision in enumerate(vision):
        if is_vision and position and vision[position - 1] and len(windows[-1]) < window:
            windows[-1].append(position)
        elif is_vision:
            windows.append([position])
    return windows


def window_redundancy(
    probs: torch.Tensor,  # [n, E]
    importance: torch.Tensor,  # [n]
    windows: list[list[int]],
    alpha: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(S, A, C) of one sample, each [windows]: likeness in routing, attention, hybrid redundancy."""
    similarity, attention = [], []
    for members in windows:
        first, end = members[0], members[-1] + 1
        p = probs[first:end]
        cosine = torch.cosine_similarity(p, p.mean(0, keepdim=True), dim=1)
        similarity.append(cosine.mean() if len(members) > 1 else cosine.new_zeros(()))
        attention.append(importance[first:end].mean())
    if not windows:
        return (probs.new_zeros(0),) * 3
    s, a = torch.stack(similarity), torch.stack(attention)
    a = a / (a.max() + 1e-10)
    return s, a, alpha * s - (1 - alpha) * a


def merge(tokens: torch.Tensor) -> torch.Tensor:
    """[W, H] -> [H]: the direction of the mean, the length of the longest."""
    # half precision is added up in single precision
    x = tokens.float() if tokens.itemsize < 4 else tokens
    mean = x.mean(0)
    return (mean / mean.norm().clamp_min(1e-10) * x.norm(dim=1).max()).to(tokens.dtype)


def prune_sample(
    hidden: torch.Tensor,  # [n, H]
    residual: torch.Tensor,  # [n, H]
    probs: torch.Tensor,  # [n, E]
    importance: torch.Tensor,  # [n]
    vision: list[bool],
    keep_ratio: float,
    merge_ratio: float,
    window: int,
    alpha: float,
) -> tuple[torch.Tensor, torch.Tensor, list[int], list[bool]]:
    """One sample after a stage: both streams [n', H], where each token stood, and which of them were merged."""
    entering = [position for position, is_vision in enumerate(vision) if is_vision]
    target = max(1, int(len(entering) * keep_ratio))
    if len(entering) <= 1 or target >= len(entering):
        return hidden, residual, list(range(len(vision))), [False] * len(vision)
    windows = cut_windows(vision, window)
    merged = min(int(target * merge_ratio), len(windows) - 1, (len(entering) - target) // max(1, window - 1))

    _, _, redundancy = window_redundancy(probs, importance, windows, alpha)
    scores, worth = redundancy.tolist(), importance.tolist()
    # sorting is stable: ties go to the earlier
    ranking = sorted(range(len(windows)), key=lambda number: -scores[number])[:merged]
    by_head = {windows[number][0]: windows[number] for number in ranking}
    members = {position for group in by_head.values() for position in group}
    outside = [position for position in entering if position not in members]
    kept = set(sorted(outside, key=lambda position: -worth[position])[: target - merged])

    index = [p for p, is_vision in enumerate(vision) if not is_vision or p in kept or p in by_head]
    streams = []
    for x in (hidden, residual):
        short = x[index]
        for slot, position in enumerate(index):
            if position in by_head:
                short[slot] = merge(x[position : by_head[position][-1] + 1])
        streams.append(short)
    return *streams, index, [position in by_head for position in index]


def dispatch_pairs(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [active pairs]: the (token, slot) pairs expert by expert, in token order; [E]: where each expert's end."""
    of_expert: list[list[int]] = [[] for _ in range(num_experts)]
    for pair, expert in enumerate(ids.flatten().tolist()):
        if 0 <= expert < num_experts:
            of_expert[expert].append(pair)
    order = torch.tensor([pair for pairs in of_expert for pair in pairs], dtype=torch.int64)
    return order, torch.tensor([len(pairs) for pairs in of_expert]).cumsum(0)


def moe_experts(
    hidden: torch.Tensor,  # [T, H]
    gate_up: torch.Tensor,  # [E, 2I, H]
    down: torch.Tensor,  # [E, H, I]
    ids: torch.Tensor,  # [T, K]
    weights: torch.Tensor,  # [T, K]
) -> torch.Tensor:
    """[T, H]: each token through each of its experts, one after the other."""
    out = torch.zeros_like(hidden)
    for token, experts in enumerate(ids.tolist()):
        for slot, expert in enumerate(experts):
            if 0 <= expert < len(down):
                gate, up = (gate_up[expert] @ hidden[token]).chunk(2)
                out[token] += weights[token, slot] * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    return out
