"""Uses of an enabled model, and what a model answers that nobody touched before: the pure half of the state machine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

import fastmmoe
from fastmmoe import FastMMoEConfig, FastVConfig, RandomConfig, SparseVLMConfig, UniformConfig
from fastmmoe_kernels import VisionLayout

from .tiny import FIRST_WORD, IMAGE_TOKEN, tiny_batch, tiny_internvl
from .tiny_deepseek import tiny_deepseek_batch, tiny_deepseek_vl2

FAMILIES = {"internvl": tiny_internvl, "deepseek_vl2": partial(tiny_deepseek_vl2, "base")}

PRUNE = dict(prune_layers=(1, 3), retention=0.4)
CONFIGS = {
    "nothing": FastMMoEConfig(),
    "experts": FastMMoEConfig(vision_top_k=2, reduction_layer=1),
    "late experts": FastMMoEConfig(vision_top_k=1, reduction_layer=4),
    "prune": FastMMoEConfig(prune_layers=(2,), retention=0.5),
    "both": FastMMoEConfig(vision_top_k=2, **PRUNE, merge_ratio=0.3),
    "stages": FastMMoEConfig(
        vision_top_k=3, reduction_layer=3, prune_layers=(1, 2, 4), retention=0.3, merge_ratio=0.5, keep_by="redundancy"
    ),
    "last layer": FastMMoEConfig(prune_layers=(5,), retention=0.3, strategy="routing_similarity"),
    "above 30": FastMMoEConfig(vision_top_k=2, **PRUNE, min_vision_tokens=30),
    "fastv": FastVConfig(layer=2, retention=0.5, vision_top_k=2),
    "fastv mean": FastVConfig(layer=3, retention=0.4, query="mean"),
    "sparsevlm": SparseVLMConfig(layers=(1, 3), keep_ratios=(0.6, 0.6), vision_top_k=2),
    "adaptive": SparseVLMConfig(layers=(1, 3), rank_scale=1.0),
    "random": RandomConfig(**PRUNE, seed=3),
    "uniform": UniformConfig(**PRUNE, vision_top_k=2),
}
REFUSED = {
    "prune layer": (FastMMoEConfig(prune_layers=(2, 6), retention=0.5), ValueError, "prune_layers"),
    "experts": (FastMMoEConfig(vision_top_k=5), ValueError, "vision_top_k"),
    "reduction layer": (FastMMoEConfig(vision_top_k=2, reduction_layer=6), ValueError, "reduction_layer"),
    "fastv's layer": (FastVConfig(layer=6), ValueError, "layer"),
    "type": ({"vision_top_k": 2}, TypeError, "config"),
    "training mode": (CONFIGS["both"], ValueError, "training"),
}

BATCHES = {  # images of each sample, padding side
    "text": ((0,), "left"),
    "one": ((1,), "left"),
    "left": ((1, 2), "left"),
    "right": ((1, 2), "right"),
    "mixed": ((2, 0), "left"),
}
TILES = ((1, 1), (2, 1))  # of DeepSeek-VL2's images


@cache
def pristine(family: str) -> nn.Module:
    """The model that all others are copies of; never run."""
    return FAMILIES[family]()


def fresh(family: str) -> nn.Module:
    return copy.deepcopy(pristine(family))


@cache
def _batch(family: str, name: str, seed: int) -> dict[str, torch.Tensor]:
    images, side = BATCHES[name]
    if family == "internvl":
        return tiny_batch(pristine(family), images, seed=seed, padding_side=side)
    batch = tiny_deepseek_batch([TILES[:count] for count in images], seed=seed, padding_side=side)
    return batch if any(images) else {key: batch[key] for key in ("input_ids", "attention_mask")}


def batch_of(family: str, name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return dict(_batch(family, name, seed))


def positions(mask: torch.Tensor) -> torch.Tensor:
    """As `generate` counts them: padding takes no part."""
    return (mask.cumsum(1) - 1).clamp_min(0)


# ------------------------------------------------------------------------------------------------ uses


class Use(NamedTuple):
    """One use of a model.

    Attributes:
        run: (model, family) -> output, of whichever type.
        oracle: another use with the same output to 1e-4; None: the same use, bit for bit.
        sees: the batch has pictures, and `report` speaks of this use afterwards.
        depends_on_head: whether the head tells FastMMoE something, which it cannot where the head is not known.
    """

    run: Callable[[nn.Module, str], Any]
    oracle: Callable[[nn.Module, str], Any] | None = None
    sees: bool = True
    depends_on_head: bool = False


def _forward(name: str, **options: Any) -> Callable:
    return lambda model, family: model(**batch_of(family, name), **options)


def _generate(name: str, **options: Any) -> Callable:
    options |= dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return lambda model, family: model.generate(**batch_of(family, name), **options)


class Wrapper(nn.Module):
    """What PEFT, DDP and the like are: another module around the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.wrapped = model
        self.eval()

    def forward(self, **inputs: Any) -> Any:
        return self.wrapped(**inputs)


def _wrapped(model, family):
    return Wrapper(model)(**batch_of(family, "left"))


def _parent(model, family):
    return model.model(**batch_of(family, "left")).last_hidden_state


def _with_positions(model, family):
    batch = batch_of(family, "left")
    return model(**batch, position_ids=positions(batch["attention_mask"]))


def _embeddings(model, family):
    batch = batch_of(family, "right")
    return model(inputs_embeds=model.get_input_embeddings()(batch.pop("input_ids")), **batch)


def _fixed_layout(model, family):
    batch = batch_of(family, "left")
    layout = VisionLayout.from_mask(batch["input_ids"] == IMAGE_TOKEN, batch["attention_mask"])
    with fastmmoe.fixed_layout(model, layout):
        return model(**batch)


def _packed(model, family):
    return model(**fastmmoe.pack_batch(batch_of(family, "left")))


def _valid_logits(model, family):
    batch = batch_of(family, "left")
    return model(**batch).logits[batch["attention_mask"].bool()]


def _causal_mask(model, family):
    """What the 2D mask means, in 4D."""
    batch = batch_of(family, "left")
    valid = batch["attention_mask"].bool()
    causal = torch.ones(2 * valid.shape[1:], dtype=torch.bool).tril()
    return model(**batch | {"attention_mask": (causal & valid.unsqueeze(1)).unsqueeze(1)}).logits[valid]


def _samples(family):
    return [batch_of(family, "one", seed) for seed in (1, 2)]


def _each_alone(model, family):
    return torch.stack([model(**sample).logits[0, -1] for sample in _samples(family)])


def _in_one_row(model, family):
    """Two samples one behind the other, each of which sees itself alone."""
    samples = _samples(family)
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    row = {key: torch.cat([s[key] for s in samples], int(key != "pixel_values")) for key in samples[0]}
    mask = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()
    row["attention_mask"] = mask[None, None]
    row["position_ids"] = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    ends = torch.tensor(lengths).cumsum(0) - 1
    return model(**row).logits[0, ends]


def _two_turns(model, family):
    """A second turn with an image of its own, on the cache of the first."""
    first, second = (batch_of(family, "one", seed) for seed in (1, 2))
    cache = DynamicCache(config=model.config.text_config)
    model(**first, past_key_values=cache, use_cache=True)
    total = first["input_ids"].shape[1] + second["input_ids"].shape[1]
    second["attention_mask"] = torch.ones(1, total, dtype=torch.long)
    return model(**second, past_key_values=cache, use_cache=True)


FORWARDS = {
    "text": Use(_forward("text"), sees=False),
    "one": Use(_forward("one")),
    "left": Use(_forward("left", use_cache=False)),
    "right": Use(_forward("right")),
    "mixed": Use(_forward("mixed", use_cache=True)),
    "last logits": Use(_forward("left", logits_to_keep=1)),
    "four logits": Use(_forward("left", logits_to_keep=4), depends_on_head=True),
    "hidden states": Use(_forward("left", output_hidden_states=True)),
    "tuple": Use(_forward("right", return_dict=False)),
    "positions": Use(_with_positions),
    "embeddings": Use(_embeddings),
    "wrapped": Use(_wrapped),
    "parent": Use(_parent),
    "fixed layout": Use(_fixed_layout),
    "packed": Use(_packed),
    "causal mask": Use(_causal_mask, oracle=_valid_logits),
    "in one row": Use(_in_one_row, oracle=_each_alone, sees=False),
    "two turns": Use(_two_turns),
}
GENERATIONS = {
    "greedy": Use(_generate("left")),
    "greedy text": Use(_generate("text"), sees=False),
    "beams": Use(_generate("left", num_beams=2)),
    "static cache": Use(_generate("right", cache_implementation="static", disable_compile=True)),
    "no cache": Use(_generate("one", use_cache=False)),
}
USES = FORWARDS | GENERATIONS


def uses_of(family: str, names: Mapping[str, Use]) -> list[str]:
    return [name for name in names if family == "internvl" or name != "packed"]


# ------------------------------------------------------------------------------------------------ answers


class Answer(NamedTuple):
    tensors: list[torch.Tensor]
    report: dict | None


def leaves(output: Any) -> Iterator[torch.Tensor]:
    """All tensors of an output, those of a cache included."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Cache):
        yield from chain.from_iterable((layer.keys, layer.values) for layer in output.layers)
    elif isinstance(output, Mapping | tuple | list):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from leaves(value)


@torch.no_grad()
def answer(model: nn.Module, family: str, run: Callable, reported: nn.Module | None) -> Answer:
    """What a use returns, and the report on `reported` afterwards, if there is one to ask for."""
    tensors = list(leaves(run(model, family)))
    return Answer(tensors, None if reported is None else fastmmoe.report(reported).to_dict())


@cache
def wanted(family: str, config: str | None, name: str, by_parent: bool = False) -> Answer:
    """The answer of a model on which nothing but this config was ever enabled."""
    model, use = fresh(family), USES[name]
    handle = model.model if by_parent else model
    if config is not None:
        fastmmoe.enable(handle, CONFIGS[config])
    return answer(model, family, use.oracle or use.run, handle if config is not None and use.sees else None)


def differences(got: Answer, want: Answer, exact: bool) -> str | None:
    """What is not as it should be, in a line."""
    if len(got.tensors) != len(want.tensors):
        return f"{len(got.tensors)} tensors, expected {len(want.tensors)}"
    for number, (have, wish) in enumerate(zip(got.tensors, want.tensors, strict=True)):
        if have.shape != wish.shape:
            return f"tensor {number} is {list(have.shape)}, expected {list(wish.shape)}"
        if exact and not torch.equal(have, wish) or not torch.allclose(have, wish, rtol=1e-4, atol=1e-4):
            off = (have.float() - wish.float()).abs().max().item()
            return f"tensor {number} is off by {off:.2g}, expected {'the same bits' if exact else 'at most 1e-4'}"
    if got.report != want.report:
        return f"report {got.report}, expected {want.report}"
    return None


# ------------------------------------------------------------------------------------------------ on a cache


def last_logits(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, n, V] -> [B, V], at each sample's last token."""
    last = (mask.cumsum(1) * mask).argmax(1)
    return logits[torch.arange(len(last)), last]


def prefill(model: nn.Module, family: str, name: str) -> tuple[torch.Tensor, Cache]:
    """(logits [B, V] of each sample's last token, the cache)."""
    batch = batch_of(family, name)
    mask = batch["attention_mask"]
    with torch.no_grad():
        out = model(**batch, position_ids=positions(mask), use_cache=True)
    return last_logits(out.logits, mask), out.past_key_values


@cache
def continued(family: str, config: str | None, name: str, cropped: int, words: tuple[int, ...]) -> torch.Tensor:
    """Logits [B, V] of a fresh model behind a prompt, without its last `cropped` tokens, and the same words for all.

    One token at a time, and no other operation on the cache than that one crop.
    """
    model = fresh(family)
    if config is not None:
        fastmmoe.enable(model, CONFIGS[config])
    logits, cache = prefill(model, family, name)
    mask = batch_of(family, name)["attention_mask"]
    if cropped:
        cache.crop(-cropped)
        mask = mask[:, :-cropped]
    for word in words:
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        logits = decode(model, cache, torch.full_like(mask[:, :1], word), mask)[:, -1]
    return logits


@torch.no_grad()
def decode(model: nn.Module, cache: Cache, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits [B, n, V] of new tokens `ids` [B, n]; `mask` [B, past + n]."""
    position = positions(mask)[:, -ids.shape[1] :]
    return model(
        input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
    ).logits


WORDS = tuple(range(FIRST_WORD + 20, FIRST_WORD + 23))
