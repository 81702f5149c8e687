"""The method, once more: one sample, one token, one head, one expert at a time.

An oracle for InternVL with a Qwen3-MoE text model. It takes nothing from the model but its weights (and the vision
tower's features) and shares no code with the package: a sequence is a plain list of tokens, a layer's cache a plain
list of (key, value) pairs. There is no padding, no batch and no mask: attention is causal because a token
only ever sees what was appended to the list before it. Slow, and meant to be read beside the paper.

`config` is a `Settings`, or any object with its attributes. All is computed in float64 unless told otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What the method leaves to choose; as given, it changes nothing."""

    vision_top_k: int | None = None
    reduction_layer: int = 2
    prune_layers: tuple[int, ...] = ()
    stage_keep_ratios: tuple[float, ...] = ()  # one per prune layer
    merge_ratio: float = 0.025
    window: int = 3
    alpha: float = 0.5
    strategy: str = "hybrid"
    merge_method: str = "mlerp"
    keep_by: str = "importance"
    thresholds: tuple[float, float] = (0.0, 0.0)  # of text and vision: lighter experts are skipped
    importances: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())  # of layers, likewise


@dataclass(frozen=True)
class Token:
    """One token on its way through the layers."""

    hidden: Tensor  # [H], the residual stream
    position: int  # in the sample's own prompt, from 0; never changes
    vision: bool


@dataclass(frozen=True)
class Stage:
    """What one prune layer did to one sample; tokens are named by their positions in the prompt."""

    layer: int
    entering: tuple[int, ...]  # the vision tokens before it
    windows: tuple[tuple[int, ...], ...]
    merged: tuple[tuple[int, ...], ...]  # the windows that became one token, standing at the window's first position
    kept: tuple[int, ...]  # vision tokens that stayed as they were
    survivors: tuple[int, ...]  # every token after it, text too
    merged_flags: tuple[bool, ...]  # per survivor: is it the result of a merge at this stage?

    @property
    def dropped(self) -> tuple[int, ...]:
        gone = {*self.kept, *(position for window in self.merged for position in window)}
        return tuple(position for position in self.entering if position not in gone)


@dataclass(frozen=True)
class Prefill:
    """One sample after its prefill; n tokens survive."""

    positions: tuple[int, ...]  # [n] of the survivors, in the prompt
    vision: tuple[bool, ...]  # [n]
    logits: Tensor  # [n, vocabulary]
    stages: tuple[Stage, ...]
    tokens_per_layer: tuple[int, ...]  # tokens in each layer's MoE
    cache_lengths: tuple[int, ...]  # per layer
    margins: dict[str, float]


@dataclass(frozen=True)
class Generation:
    """Greedy decoding of one sample."""

    prefill: Prefill
    ids: list[int]
    logits: Tensor  # [len(ids), vocabulary]: what each id was chosen from
    margins: dict[str, float]


@dataclass
class Margins:
    """The narrowest choice of each kind made so far: how far the result is from flipping on a rounding error."""

    routing: float = math.inf  # difference in probability of the last expert in and the first one out
    windows: float = math.inf  # difference in redundancy of the last window merged and the first one not
    tokens: float = math.inf  # the same of importance, token kept and token dropped, as a share of the largest one
    logits: float = math.inf  # difference in logit of the best and the second best next token

    def note(self, kind: str, gap: float) -> None:
        setattr(self, kind, min(getattr(self, kind), gap))


def best(scores: Sequence[float], count: int) -> tuple[list[int], float]:
    """Indices of the `count` largest scores, largest first, ties to the lower index; and the gap to the next one."""
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    if 0 < count < len(scores):
        return order[:count], scores[order[count - 1]] - scores[order[count]]
    return order[:count], math.inf


# pruning, in the order of the paper's section


def cut_windows(vision: Sequence[bool], window: int) -> list[list[int]]:
    """Indices of the vision tokens of one sample, cut into windows; none reaches over a stretch of text."""
    windows: list[list[int]] = []
    for index, is_vision in enumerate(vision):
        if not is_vision:
            continue
        continues = index > 0 and vision[index - 1]
        if continues and len(windows[-1]) < window:
            windows[-1].append(index)
        else:
            windows.append([index])
    return windows


def count_survivors(n_vis: int, n_windows: int, keep_ratio: float, merge_ratio: float, window: int) -> tuple[int, int]:
    """(vision tokens that stay, how many of them come from a merge)."""
    target = max(1, int(n_vis * keep_ratio))
    if n_vis <= 1 or target >= n_vis:
        return n_vis, 0
    return target, min(int(target * merge_ratio), n_windows - 1, (n_vis - target) // max(1, window - 1))


def routing_similarity(probs: list[Tensor]) -> float:
    """Mean cosine of a window's routing probabilities `[E]` to their mean."""
    if len(probs) == 1:
        return 0.0
    mean = sum(probs) / len(probs)
    return sum(float(p @ mean / (p.norm() * mean.norm())) for p in probs) / len(probs)


def window_attention(importance: Sequence[float], windows: list[list[int]]) -> list[float]:
    """Window means of the last token's attention, divided by the largest of them."""
    means = [sum(importance[index] for index in window) / len(window) for window in windows]
    return [mean / (max(means) + 1e-10) for mean in means]


def redundancy(
    probs: list[Tensor], importance: Sequence[float], windows: list[list[int]], strategy: str, alpha: float
) -> list[float]:
    """How readily each window is merged."""
    similarity = [routing_similarity([probs[index] for index in window]) for window in windows]
    attention = window_attention(importance, windows)
    if strategy == "routing_similarity":
        return similarity
    if strategy == "dynamic_attention":
        return [-a for a in attention]
    assert strategy == "hybrid", strategy
    return [alpha * s - (1 - alpha) * a for s, a in zip(similarity, attention, strict=True)]


def merge(vectors: list[Tensor], method: str) -> Tensor:
    """One vector for a window's."""
    mean = sum(vectors) / len(vectors)
    if method == "mean":
        return mean
    assert method == "mlerp", method
    return mean / max(float(mean.norm()), 1e-10) * max(float(vector.norm()) for vector in vectors)


class Sample:
    """One prompt: prefilled when made, then one token at a time."""

    def __init__(self, weights: dict[str, Tensor], text_config, config, embeddings: Tensor, vision: Sequence[bool]):
        self.weights, self.text, self.config = weights, text_config, config
        self.caches: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(text_config.num_hidden_layers)]
        self.margins = Margins()
        self.stages: list[Stage] = []
        self.tokens_per_layer: list[int] = []
        prompt = [Token(embeddings[index], index, is_vision) for index, is_vision in enumerate(vision)]
        self.next_position = len(prompt)
        self.survivors = self.layers(prompt, prefill=True)
        self.logits = torch.stack([self.head(token) for token in self.survivors])  # [n, vocabulary]

    def step(self, token_id: int) -> Tensor:
        """Logits after one decoded token, which is text whatever its id is."""
        embedding = self.weights["model.language_model.embed_tokens.weight"][token_id]
        token = Token(embedding, self.next_position, vision=False)
        self.next_position += 1
        return self.head(*self.layers([token], prefill=False))

    def head(self, token: Token) -> Tensor:
        final = self.norm(token.hidden, self.weights["model.language_model.norm.weight"])
        return self.weights["lm_head.weight"] @ final

    def layers(self, tokens: list[Token], prefill: bool) -> list[Token]:
        for layer in range(self.text.num_hidden_layers):
            tokens, importance = self.attention(layer, tokens)
            weight = self.weight(layer, "post_attention_layernorm.weight")
            normed = [self.norm(token.hidden, weight) for token in tokens]
            if prefill and layer in self.config.prune_layers:
                tokens, normed = self.prune(layer, tokens, normed, importance)
            if prefill:
                self.tokens_per_layer.append(len(tokens))
            tokens = [
                replace(token, hidden=token.hidden + self.mlp(layer, x, token.vision))
                for token, x in zip(tokens, normed, strict=True)
            ]
        return tokens

    def weight(self, layer: int, name: str) -> Tensor:
        return self.weights[f"model.language_model.layers.{layer}.{name}"]

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension."""
        return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.text.rms_norm_eps)

    def rotate(self, x: Tensor, position: int) -> Tensor:
        """RoPE: turn each pair (x[i], x[i + D/2]) of every head `[heads, D]` by its own angle."""
        half = x.shape[-1] // 2
        theta = self.text.rope_parameters["rope_theta"]
        angles = torch.tensor([position * theta ** (-i / half) for i in range(half)], dtype=x.dtype)
        cos, sin, first, second = angles.cos(), angles.sin(), x[:, :half], x[:, half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def attention(self, layer: int, tokens: list[Token]) -> tuple[list[Token], list[float]]:
        """Tokens after attention and residual add; and the last one's attention to all in the cache, head mean."""
        cache, after, importance = self.caches[layer], [], []
        for token in tokens:
            x = self.norm(token.hidden, self.weight(layer, "input_layernorm.weight"))
            query, key, value = self.query_key_value(layer, x, token.position)
            cache.append((key, value))
            keys, values = (torch.stack(part) for part in zip(*cache, strict=True))  # [cached, kv_heads, D]
            heads, kv_heads = len(query), len(key)
            mixed, rows = [], []
            for head in range(heads):
                group = head // (heads // kv_heads)
                row = torch.softmax(keys[:, group] @ query[head] / math.sqrt(query.shape[1]), dim=0)  # [cached]
                mixed.append(row @ values[:, group])
                rows.append(row)
            output = self.weight(layer, "self_attn.o_proj.weight") @ torch.cat(mixed)
            after.append(replace(token, hidden=token.hidden + output))
            importance = (sum(rows) / heads).tolist()
        return after, importance

    def query_key_value(self, layer: int, x: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of one token: query [heads, D], key and value [kv_heads, D], rotated."""
        heads, kv_heads, dim = self.text.num_attention_heads, self.text.num_key_value_heads, self.text.head_dim
        query = (self.weight(layer, "self_attn.q_proj.weight") @ x).view(heads, dim)
        key = (self.weight(layer, "self_attn.k_proj.weight") @ x).view(kv_heads, dim)
        value = (self.weight(layer, "self_attn.v_proj.weight") @ x).view(kv_heads, dim)
        query = self.rotate(self.norm(query, self.weight(layer, "self_attn.q_norm.weight")), position)
        key = self.rotate(self.norm(key, self.weight(layer, "self_attn.k_norm.weight")), position)
        return query, key, value

    def gate(self, layer: int, x: Tensor) -> Tensor:
        return torch.softmax(self.weight(layer, "mlp.gate.weight") @ x, dim=0)  # [E]

    def mlp(self, layer: int, x: Tensor, vision: bool) -> Tensor:
        if f"model.language_model.layers.{layer}.mlp.gate.weight" not in self.weights:  # a dense layer
            gate, up, down = (self.weight(layer, f"mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
            return down @ (torch.nn.functional.silu(gate @ x) * (up @ x))
        probs = self.gate(layer, x)
        gate_up, down = self.weight(layer, "mlp.experts.gate_up_proj"), self.weight(layer, "mlp.experts.down_proj")
        output = torch.zeros_like(x)
        for expert, weight in self.route(layer, probs, vision):
            gate, up = (gate_up[expert] @ x).chunk(2)
            output += weight * (down[expert] @ (torch.nn.functional.silu(gate) * up))
        return output

    def route(self, layer: int, probs: Tensor, vision: bool) -> list[tuple[int, float]]:
        """(expert, weight) pairs of one token."""
        top_k = self.text.num_experts_per_tok
        scores = probs.tolist()
        full, gap = best(scores, top_k)
        chosen = full
        if vision and self.config.vision_top_k is not None and layer >= self.config.reduction_layer:
            chosen, gap = best(scores, self.config.vision_top_k)
        self.margins.note("routing", gap)
        if self.text.norm_topk_prob:
            factor = 1 / sum(scores[expert] for expert in chosen)
        else:  # keep the sum that the pretrained model's choice has
            factor = sum(scores[expert] for expert in full) / sum(scores[expert] for expert in chosen)
        return [(expert, factor * scores[expert]) for expert in chosen]

    def prune(
        self, layer: int, tokens: list[Token], normed: list[Tensor], importance: list[float]
    ) -> tuple[list[Token], list[Tensor]]:
        """One stage: shorten both streams, the residual (in the tokens) and the normed one (the MoE's input)."""
        config, vision = self.config, [token.vision for token in tokens]
        entering = [index for index, is_vision in enumerate(vision) if is_vision]
        windows = cut_windows(vision, config.window)
        keep_ratio = config.stage_keep_ratios[list(config.prune_layers).index(layer)]
        target, n_merged = count_survivors(len(entering), len(windows), keep_ratio, config.merge_ratio, config.window)
        merged: list[list[int]] = []
        kept = entering
        if target < len(entering):
            probs = [self.gate(layer, x) for x in normed]
            scores = redundancy(probs, importance, windows, config.strategy, config.alpha)
            chosen, gap = best(scores, n_merged)
            self.margins.note("windows", gap)
            merged = [windows[index] for index in sorted(chosen)]

            members = {index for window in merged for index in window}
            outside = [index for index in entering if index not in members]
            if config.keep_by == "redundancy":
                window_of = {index: number for number, window in enumerate(windows) for index in window}
                worth = [-scores[window_of[index]] for index in outside]
            elif config.strategy == "routing_similarity":
                worth = [float(probs[index].norm()) for index in outside]
            else:
                worth = [importance[index] for index in outside]
            chosen, gap = best(worth, target - n_merged)
            kept = [outside[index] for index in sorted(chosen)]
            if config.keep_by == "importance":
                self.margins.note("tokens", gap / max(worth))
            elif {window_of[index] for index in kept}.isdisjoint(window_of[index] for index in {*outside} - {*kept}):
                self.margins.note("windows", gap)  # else a window is cut: its tokens tie, and the earlier ones stay

        short: list[tuple[Token, Tensor, bool]] = []
        for index, token in enumerate(tokens):
            window = next((window for window in merged if window[0] == index), None)
            if window is not None:
                hidden = merge([tokens[member].hidden for member in window], config.merge_method)
                x = merge([normed[member] for member in window], config.merge_method)
                short.append((replace(token, hidden=hidden), x, True))
            elif not token.vision or index in kept:
                short.append((token, normed[index], False))

        def positions(indices: Sequence[int]) -> tuple[int, ...]:
            return tuple(tokens[index].position for index in indices)

        self.stages.append(
            Stage(
                layer,
                positions(entering),
                tuple(positions(window) for window in windows),
                tuple(positions(window) for window in merged),
                positions(kept),
                tuple(token.position for token, _, _ in short),
                tuple(flag for _, _, flag in short),
            )
        )
        return [token for token, _, _ in short], [x for _, x, _ in short]


@torch.no_grad()
def _samples(model, inputs: dict[str, Tensor], config, dtype: torch.dtype) -> list[Sample]:
    """One prefilled sample per row of a padded batch, padding taken off."""
    weights = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
    features = []
    if inputs.get("pixel_values") is not None:
        features = list(model.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1).to(dtype))
    samples, used = [], 0
    for ids, valid in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        ids = ids[valid]
        embeddings = weights["model.language_model.embed_tokens.weight"][ids].clone()
        # without pictures in the call, an image token is a word like any other
        vision = [bool(features) and token == model.config.image_token_id for token in ids.tolist()]
        for index, is_vision in enumerate(vision):
            if is_vision:
                embeddings[index] = features[used]
                used += 1
        samples.append(Sample(weights, model.config.text_config, config, embeddings, vision))
    assert used == len(features), (used, len(features))
    return samples


def prefill(model, inputs: dict[str, Tensor], config, dtype: torch.dtype = torch.float64) -> list[Prefill]:
    """Each sample of a padded batch on its own: the survivors' logits, and who survived each stage."""
    return [_prefilled(sample) for sample in _samples(model, inputs, config, dtype)]


def _prefilled(sample: Sample) -> Prefill:
    return Prefill(
        positions=tuple(token.position for token in sample.survivors),
        vision=tuple(token.vision for token in sample.survivors),
        logits=sample.logits,
        stages=tuple(sample.stages),
        tokens_per_layer=tuple(sample.tokens_per_layer),
        cache_lengths=tuple(map(len, sample.caches)),
        margins=dict(vars(sample.margins)),
    )


@torch.no_grad()
def _decode(sample: Sample, steps: int, choose: Callable[[int, Tensor], int]) -> Generation:
    start = _prefilled(sample)
    logits, ids, rows = sample.logits[-1], [], []
    for step in range(steps):
        if step:
            logits = sample.step(ids[-1])
        rows.append(logits)
        ids.append(choose(step, logits))
    return Generation(start, ids, torch.stack(rows), dict(vars(sample.margins)))


def greedy(
    model,
    inputs: dict[str, Tensor],
    config,
    max_new_tokens: int,
    dtype: torch.dtype = torch.float64,
    samples: Callable[..., list[Sample]] = _samples,
) -> list[Generation]:
    """Greedy continuation of each sample of a padded batch; `samples` makes another family's."""

    def decode(sample: Sample) -> Generation:
        def choose(step: int, logits: Tensor) -> int:
            (token, *_), gap = best(logits.tolist(), 1)
            sample.margins.note("logits", gap)
            return token

        return _decode(sample, max_new_tokens, choose)

    return [decode(sample) for sample in samples(model, inputs, config, dtype)]


def log_probability(
    model, inputs: dict[str, Tensor], config, continuations: list[list[int]], dtype: torch.dtype = torch.float64
) -> list[float]:
    """Log probability of a given continuation of each sample."""
    totals = []
    for sample, ids in zip(_samples(model, inputs, config, dtype), continuations, strict=True):
        logits = _decode(sample, len(ids), lambda step, _, ids=ids: ids[step]).logits
        totals.append(sum(float(row.log_softmax(0)[token]) for row, token in zip(logits, ids, strict=True)))
    return totals
