"""The method on the stock model's own layers: one sample, no padding, and sequences that are really shorter.

An oracle for any family. It takes a prompt through the stock layers one after the other, with eager attention and masks
made here; at a prune layer it stops the layer in front of its MoE, prunes by `naive.py`, and goes on by hand. It
shares no code with the package. What a layer is called with beside its tokens (RoPE tables, position ids) is recorded
from a forward of the stock model over the whole sequence, prompt and answer, and cut to the tokens that are left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .naive import Settings, best, count_survivors, cut_windows, merge, redundancy


@dataclass(frozen=True)
class Parts:
    """Where a family's layers keep what the loop touches, said once more, apart from the package's description.

    Attributes:
        text: path of the text model.
        norm, moe: of a layer; gate: of the MoE.
        scoring: of the gate's logits: "softmax", "sigmoid", or "none" where the gate returns probabilities.
        logits: which of the gate's outputs are its logits.
        normalised: the gate's weights of a token have a fixed sum; else fewer are scaled to the sum of all.
        top_k: (gate, K) -> sets how many experts the gate chooses.
        vision_gate: the gate gets vision tokens alone.
        final_norm: of the text model.
        head: hidden [n, H] -> logits, given the model.
        per_token: further arguments of a layer that have the tokens at dimension 1.
        finish: (layer, residual, MoE output) -> the layer's output.
        slot_positions: `position_ids` are places in the cache.
    """

    text: str = "model.language_model"
    norm: str = "post_attention_layernorm"
    moe: str = "mlp"
    gate: str = "gate"
    scoring: str = "softmax"
    logits: int = 0
    normalised: bool = True
    top_k: Callable[[nn.Module, int], None] = lambda gate, k: setattr(gate, "top_k", k)
    vision_gate: bool = False
    final_norm: str = "norm"
    head: Callable[[nn.Module, Tensor], Tensor] = lambda model, hidden: model.get_output_embeddings()(hidden)
    per_token: tuple[str, ...] = ()
    finish: Callable[[nn.Module, Tensor, Tensor], Tensor] = lambda layer, residual, output: residual + output
    slot_positions: bool = False


class _InFrontOfMoE(Exception):
    """Stops a layer."""


@dataclass
class Loop:
    """One sample's prompt and answer.

    Attributes:
        logits: [n', vocabulary] of each stretch of tokens that was run; in the prompt's those that survive.
        kept: per stretch, which tokens of the sequence these are.
        lengths: tokens in each layer's MoE, of the prompt.
        margins: how far the narrowest choice of windows, or of tokens, was from another one.
    """

    model: nn.Module
    parts: Parts
    settings: Settings
    logits: list[Tensor] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)


def run(
    model: nn.Module, parts: Parts, settings: Settings, inputs: dict[str, Tensor], vision: Sequence[bool],
    stretches: Sequence[int],
) -> Loop:  # fmt: skip
    """Run one sample.

    Args:
        model: the stock model; it is not changed.
        inputs: of one sample, prompt and answer together, without padding.
        vision: which of its tokens are vision tokens.
        stretches: how many tokens each forward takes, the prompt first.
    """
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    text = model.get_submodule(parts.text)
    loop, records = Loop(model, parts, settings), _record(model, text, parts, inputs)
    cache = DynamicCache(config=text.config)
    layers = list(text.layers)
    held: list[list[int]] = [[] for _ in layers]  # per layer, the tokens in its cache
    end = 0
    for count in stretches:
        tokens, end = list(range(end, end + count)), end + count
        is_prompt = tokens[0] == 0
        hidden = records["embeddings"][:, tokens]  # [1, n, H]
        carried: dict[str, Any] = {}
        for number, layer in enumerate(layers):
            arguments = _arguments(text.config, records["layers"][number], number, tokens, held[number], hidden, parts,
                                   stretches[0])  # fmt: skip
            arguments |= {"past_key_values": cache} | carried
            flags = [vision[token] for token in tokens]
            if any(flags) and number in settings.prune_layers:
                hidden, rest, tokens_left = _pruned(loop, layer, number, hidden, arguments, flags, tokens)
            else:
                with _fewer_experts(_gate(layer, parts), parts, settings, number, flags):
                    output = layer(hidden, **arguments)
                hidden, *rest = output if isinstance(output, tuple) else (output,)
                tokens_left = tokens
            if rest:
                carried = {"prev_topk_indices": rest[0]}
            held[number] += tokens
            tokens = tokens_left
            if is_prompt:
                loop.lengths.append(len(tokens))
            features = records["features"]
            if features is not None and number < len(features):
                row = {token: i for i, token in enumerate(t for t in range(len(vision)) if vision[t])}
                add = torch.stack([features[number][row[t]] if vision[t] else 0 * hidden[0, 0] for t in tokens])
                hidden = hidden + add
        final = text.get_submodule(parts.final_norm)(hidden)
        loop.logits.append(parts.head(model, final)[0])
        loop.kept.append(tokens)
    return loop


def run_whole(
    model: nn.Module, parts: Parts, settings: Settings, inputs: dict[str, Tensor], vision: Sequence[bool],
    stretches: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """Logits [n, vocabulary] of each stretch of a prompt and its answer, by the stock model: tokens are not pruned.

    Args:
        model, parts, settings, inputs, vision, stretches: as in `run`.
    """
    model = copy.deepcopy(model)
    shape, n = inputs["input_ids"].shape, stretches[0]
    per_token = {name for name, value in inputs.items() if value.shape == shape}
    prompt = {name: value[:, :n] if name in per_token else value for name, value in inputs.items()}
    with ExitStack() as stack:
        for number, layer in enumerate(model.get_submodule(parts.text).layers):
            stack.enter_context(_fewer_experts(_gate(layer, parts), parts, settings, number, list(vision[:n])))
        output = model(**prompt, use_cache=True)
    logits, end = [output.logits[0]], n
    for count in stretches[1:]:
        end += count
        with ExitStack() as stack:
            for number, layer in enumerate(model.get_submodule(parts.text).layers):
                stack.enter_context(_fewer_experts(_gate(layer, parts), parts, settings, number, [False] * count))
            # as a user goes on: some models take more than the new tokens, and `generate` knows which
            step = model.generate(
                **{name: inputs[name][:, :end] for name in per_token},
                past_key_values=output.past_key_values, max_new_tokens=1, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        logits.append(step.logits[0])
    return logits


def _gate(layer: nn.Module, parts: Parts) -> nn.Module | None:
    try:
        return layer.get_submodule(parts.moe).get_submodule(parts.gate)
    except AttributeError:
        return None


def _record(model: nn.Module, text: nn.Module, parts: Parts, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What every layer gets in a stock forward over the whole sequence, and what stands in front of the first one."""
    found: dict[str, Any] = {"layers": {}, "features": None}

    def of_text(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found["features"] = kwargs.get("deepstack_visual_embeds")

    def of_layer(number: int) -> Callable:
        def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found["layers"][number] = dict(kwargs)
            if number == 0:
                found["embeddings"] = args[0] if args else kwargs["hidden_states"]

        return look

    handles = [text.register_forward_pre_hook(of_text, with_kwargs=True)]
    handles += [
        layer.register_forward_pre_hook(of_layer(number), with_kwargs=True) for number, layer in enumerate(text.layers)
    ]
    try:
        model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _arguments(
    config: Any, given: dict[str, Any], number: int, tokens: list[int], held: list[int], hidden: Tensor, parts: Parts,
    first: int,
) -> dict[str, Any]:
    """What a layer gets for these tokens, beside the cache."""

    def cut(value: Any, dim: int) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(one, dim) for one in value)
        return value if value is None else value.index_select(dim, torch.tensor(tokens))

    arguments = {"position_embeddings": cut(given.get("position_embeddings"), 1)}
    if "position_ids" in given:
        arguments["position_ids"] = cut(given["position_ids"], -1)
        if parts.slot_positions:
            arguments["position_ids"] = torch.arange(len(held), len(held) + len(tokens)).unsqueeze(0)
    arguments |= {name: cut(given[name], 1) for name in parts.per_token}
    if "shared_kv_states" in given:
        arguments["shared_kv_states"] = type(given["shared_kv_states"])()
    prompt = sum(token < first for token in held)
    arguments["attention_mask"] = _mask(config, number, len(held), len(tokens), hidden, prompt)
    return arguments


def _mask(config: Any, number: int, held: int, new: int, hidden: Tensor, prompt: int) -> Tensor | None:
    """Additive [1, 1, new, keys], by places among the tokens that this layer has seen; None for a recurrent layer."""
    kinds = getattr(config, "layer_types", None)
    kind = kinds[number] if kinds else "full_attention"
    if kind in ("linear_attention", "conv"):
        return None
    query, key = torch.arange(held, held + new).unsqueeze(1), torch.arange(held + new).unsqueeze(0)
    sees = key <= query
    if kind == "sliding_attention":
        sees &= key > query - config.sliding_window
        sees = sees[:, max(0, held - config.sliding_window + 1) :]  # what the cache still has
    elif kind == "chunked_attention":
        sees &= key // config.attention_chunk_size == query // config.attention_chunk_size
        sees = sees[:, max(0, held - config.attention_chunk_size + 1) :]
    elif kind == "reference_sliding_attention" and held:
        sees &= (key < prompt) | (key > query - config.sliding_window)
        gone = max(0, held - prompt - config.sliding_window + 1)  # of the answer
        sees = torch.cat((sees[:, :prompt], sees[:, prompt + gone :]), 1)
    lowest = torch.finfo(hidden.dtype).min
    return torch.zeros(sees.shape, dtype=hidden.dtype).masked_fill(~sees, lowest)[None, None]


class _fewer_experts:
    """While a layer runs, its gate gives some tokens fewer experts; empty slots have weight 0."""

    def __init__(self, gate: nn.Module | None, parts: Parts, settings: Settings, number: int, flags: list[bool]):
        self.reduces = settings.vision_top_k is not None and number >= settings.reduction_layer and any(flags)
        on = self.reduces or any(settings.thresholds)
        self.gate, self.parts, self.settings, self.flags = gate if on else None, parts, settings, flags
        self.number = number

    def __enter__(self) -> _fewer_experts:
        if self.gate is not None:
            self.gate.forward = self._choose
        return self

    def __exit__(self, *_: object) -> None:
        if self.gate is not None:
            del self.gate.forward

    def _choose(self, hidden: Tensor, *args: Any) -> tuple:
        logits, weights, ids = type(self.gate).forward(self.gate, hidden, *args)
        rows = [True] * len(weights) if self.parts.vision_gate else self.flags
        if self.reduces:
            weights, ids = self._fewer(hidden, args, weights, ids, torch.tensor(rows).unsqueeze(1))
        if any(self.settings.thresholds):
            # in front of what scales all weights, or those of single experts
            scale = getattr(self.gate, "per_expert_scale", None)
            scale = getattr(self.gate, "routed_scaling_factor", 1.0) if scale is None else scale[ids]
            shares = weights.double() / scale
            matters = [self.settings.importances[is_vision][self.number] for is_vision in rows]
            least = [self.settings.thresholds[is_vision] for is_vision in rows]
            rows = zip(shares.tolist(), matters, least, strict=True)
            weights = weights * torch.tensor([[share * by >= tau for share in token] for token, by, tau in rows])
        return logits, weights, ids

    def _fewer(self, hidden: Tensor, args: tuple, weights: Tensor, ids: Tensor, is_vision: Tensor) -> tuple:
        gate, few = self.gate, self.settings.vision_top_k
        stock = type(gate).forward
        top_k = weights.shape[1]
        self.parts.top_k(gate, few)
        _, fewer, those = stock(gate, hidden, *args)
        self.parts.top_k(gate, top_k)
        if not self.parts.normalised:
            fewer = fewer * (weights.sum(1, keepdim=True) / fewer.sum(1, keepdim=True))
        empty = (len(fewer), top_k - few)
        fewer, those = torch.cat((fewer, fewer.new_zeros(empty)), 1), torch.cat((those, those.new_zeros(empty)), 1)
        return torch.where(is_vision, fewer, weights), torch.where(is_vision, those, ids)


def _pruned(
    loop: Loop, layer: nn.Module, number: int, hidden: Tensor, arguments: dict[str, Any], flags: list[bool],
    tokens: list[int],
) -> tuple[Tensor, list, list[int]]:  # fmt: skip
    """Run a prune layer; (its output, what else it returned, the tokens that are left)."""
    parts, settings = loop.parts, loop.settings
    seen: dict[str, Any] = {}

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen["moe"] = args
        raise _InFrontOfMoE

    moe, norm, attention = layer.get_submodule(parts.moe), layer.get_submodule(parts.norm), layer.self_attn
    handles = [
        attention.register_forward_hook(lambda module, args, output: seen.update(attention=output)),
        norm.register_forward_hook(lambda module, args, output: seen.update(residual=args[0], normed=output)),
        moe.register_forward_pre_hook(stop, with_kwargs=True),
    ]
    try:
        layer(hidden, **arguments)
    except _InFrontOfMoE:
        pass
    finally:
        for handle in handles:
            handle.remove()
    rows = seen["attention"][1][0, :, -1]  # [heads, keys]
    importance = rows.mean(0)[-len(tokens) :].tolist()
    residual, normed, extra = seen["residual"][0], seen["normed"][0], seen["moe"][1:]

    def probabilities() -> list[Tensor]:
        gate = _gate(layer, parts)
        given = (moe.expert_bias,) if getattr(moe, "use_expert_bias", False) else ()
        logits = type(gate).forward(gate, normed, *given)[parts.logits]
        scores = {"softmax": lambda x: x.softmax(-1), "sigmoid": lambda x: x.sigmoid(), "none": lambda x: x}
        return list(scores[parts.scoring](logits.float()))

    left = choose(loop, number, flags, importance, probabilities)
    streams = [torch.stack([merge([s[i] for i in group], settings.merge_method) if len(group) > 1 else s[group[0]]
                            for group in left]) for s in (residual, normed)]  # fmt: skip
    heads = torch.tensor([group[0] for group in left])
    extra = tuple(one if one is None else one.index_select(1, heads) for one in extra)
    with _fewer_experts(_gate(layer, parts), parts, settings, number, [flags[group[0]] for group in left]):
        mixed = moe(streams[1].unsqueeze(0), *extra)
    mixed = mixed[0] if isinstance(mixed, tuple) else mixed
    residual = streams[0].unsqueeze(0)
    output = parts.finish(layer, residual, mixed.view(residual.shape))
    return output, list(seen["attention"][2:]), [tokens[group[0]] for group in left]


def choose(
    loop: Loop, number: int, flags: list[bool], importance: list[float], probabilities: Callable[[], list[Tensor]]
) -> list[list[int]]:
    """What is left of a stage's tokens, each as the list of those that it stands for."""
    settings = loop.settings
    entering = [index for index, is_vision in enumerate(flags) if is_vision]
    windows = cut_windows(flags, settings.window)
    keep_ratio = settings.stage_keep_ratios[settings.prune_layers.index(number)]
    target, n_merged = count_survivors(len(entering), len(windows), keep_ratio, settings.merge_ratio, settings.window)
    if target >= len(entering):
        return [[index] for index in range(len(flags))]
    probs = probabilities()
    scores = redundancy(probs, importance, windows, settings.strategy, settings.alpha)
    chosen, gap = best(scores, n_merged)
    loop.margins.append(gap)
    merged = {windows[index][0]: windows[index] for index in chosen}
    members = {index for window in merged.values() for index in window}
    outside = [index for index in entering if index not in members]
    worth = [float(probs[i].norm()) if settings.strategy == "routing_similarity" else importance[i] for i in outside]
    chosen, gap = best(worth, target - n_merged)
    # keys that a sparse layer does not choose have no attention at all: they tie, and the earlier ones stay
    loop.margins.append(gap / max(worth) or 1.0)
    kept = {outside[index] for index in chosen}
    stays = [i for i, is_vision in enumerate(flags) if not is_vision or i in kept or i in merged]
    return [merged.get(index, [index]) for index in stays]
