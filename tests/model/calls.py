"""Uses of an enabled model, and what a model answers that nobody touched before: the pure half of the state machine."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

import fastmmoe
from fastmmoe import FastMMoEConfig, FastVConfig, RandomConfig, SparseVLMConfig, UniformConfig
from fastmmoe.config import ReductionConfig
from fastmmoe.families import find_text_model
from fastmmoe_kernels import VisionLayout

from . import tiny_families
from .families import LOOPS, LoopFamily
from .hostile.families import PLACEHOLDERS, is_per_token, prompt
from .hostile.families import batch_of as padded
from .methods import skipping
from .tiny import FIRST_WORD, IMAGE_TOKEN, tiny_batch, tiny_internvl
from .tiny_deepseek import tiny_deepseek_batch, tiny_deepseek_vl2

# ------------------------------------------------------------------------------------------------ families

TILES = ((1, 1), (2, 1))  # of DeepSeek-VL2's images
BATCHES = {  # images of each sample, padding side
    "text": ((0,), "left"),
    "one": ((1,), "left"),
    "left": ((1, 2), "left"),
    "right": ((1, 2), "right"),
    "mixed": ((2, 0), "left"),
}


class Family(NamedTuple):
    """What the machine needs to know of a family; the rest it finds out by trying.

    Attributes:
        make: () -> a model in evaluation mode, which says no placeholder and no end.
        batch: (images of each sample, padding side, seed) -> inputs.
        known: where its text model is, what its vision tokens can do.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[tuple[int, ...], str, int], dict[str, torch.Tensor]]
    known: LoopFamily

    @property
    def tolerance(self) -> float:
        """Absolute, of logits that are computed another way."""
        return max(1e-4, self.known.tolerance)


def _internvl_batch(images: tuple[int, ...], side: str, seed: int) -> dict[str, torch.Tensor]:
    return tiny_batch(pristine("internvl"), images, seed=seed, padding_side=side)


def _deepseek_batch(images: tuple[int, ...], side: str, seed: int) -> dict[str, torch.Tensor]:
    batch = tiny_deepseek_batch([TILES[:count] for count in images], seed=seed, padding_side=side)
    return batch if any(images) else {key: batch[key] for key in ("input_ids", "attention_mask")}


def _model(name: str) -> nn.Module:
    model, _ = tiny_families.FAMILIES[name]()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = PLACEHOLDERS
    return model


def _batch(name: str, images: tuple[int, ...], side: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 80, (count,), generator=generator).tolist())

    # a sample of text alone opens with more words, that it is not the shortest by far
    texts = [
        (words(3 + row), *(words(3) for _ in range(count - 1)), words(5)) if count else (words(8 + row),)
        for row, count in enumerate(images)
    ]
    return padded([prompt(name, texts_of, seed=10 * seed + row) for row, texts_of in enumerate(texts)], side)


FAMILIES = {
    "internvl": Family(tiny_internvl, _internvl_batch, LoopFamily(placeholders=(IMAGE_TOKEN,))),
    "deepseek_vl2": Family(
        partial(tiny_deepseek_vl2, "base"), _deepseek_batch, LoopFamily(placeholders=(IMAGE_TOKEN,))
    ),
} | {name: Family(partial(_model, name), partial(_batch, name), loop) for name, loop in LOOPS.items()}


@cache
def pristine(family: str) -> nn.Module:
    """The model that all others are copies of; never run."""
    return FAMILIES[family].make()


def fresh(family: str) -> nn.Module:
    return copy.deepcopy(pristine(family))


def parent_of(model: nn.Module) -> nn.Module:
    """The module below the head; the model itself where the head is further down."""
    return getattr(model, "model", model)


def layers_of(model: nn.Module, family: str) -> nn.ModuleList:
    return model.get_submodule(FAMILIES[family].known.parts.text).layers


@cache
def _batch_of(family: str, name: str, seed: int) -> dict[str, torch.Tensor]:
    return FAMILIES[family].batch(*BATCHES[name], seed)


def batch_of(family: str, name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return dict(_batch_of(family, name, seed))


def is_vision(family: str, ids: torch.Tensor) -> torch.Tensor:
    return torch.isin(ids, torch.tensor(FAMILIES[family].known.placeholders))


# ------------------------------------------------------------------------------------------------ configs


@cache
def configs(family: str) -> dict[str, ReductionConfig]:
    """Of all methods, where a family's layers allow them."""
    known, depth = FAMILIES[family].known, len(layers_of(pristine(family), family))
    # more than one image of most families has
    many = 2 * int(is_vision(family, batch_of(family, "one")["input_ids"]).sum()) - 2

    def fewer(top_k: int, layer: int = 2) -> dict[str, int]:
        return dict(vision_top_k=top_k, reduction_layer=layer) if known.experts else {}

    found: dict[str, ReductionConfig] = {"nothing": FastMMoEConfig()}
    if known.experts:
        found["experts"] = FastMMoEConfig(**fewer(2, 1))
        found["late experts"] = FastMMoEConfig(**fewer(1, depth - 2))
        text = {} if known.parts.vision_gate else {"special_tokens": (7, 8)}
        found["skipping"] = skipping(depth, **text, **({} if text else {"text_threshold": 0.0}))
    if not known.prune_layers:
        return found | {
            "above 30": FastMMoEConfig(**fewer(1), min_vision_tokens=many),
            "random": RandomConfig(**fewer(3, 1)),
            "uniform": UniformConfig(**fewer(3, depth // 2)),
        }
    sound = prune_layers(family)
    first, last = known.prune_layers[0], known.prune_layers[-1]
    second = next(layer for layer in sound if layer > first)
    stages = sorted({first, second, *[layer for layer in sound if layer > last][:1]})
    prune = dict(prune_layers=known.prune_layers, retention=0.4)
    behind = tuple(layer for layer in known.prune_layers if layer + 1 < depth)  # not for all methods the last one
    return found | {
        "prune": FastMMoEConfig(prune_layers=(second,), retention=0.5),
        "both": FastMMoEConfig(**fewer(2), **prune, merge_ratio=0.3),
        "stages": FastMMoEConfig(
            **fewer(3, depth // 2), prune_layers=stages, retention=0.3, merge_ratio=0.5, keep_by="redundancy"
        ),
        "last layer": FastMMoEConfig(prune_layers=sound[-1:], retention=0.3, strategy="routing_similarity"),
        "above 30": FastMMoEConfig(**fewer(2), **prune, min_vision_tokens=many),
        "fastv": FastVConfig(layer=first + 1, retention=0.5, **fewer(2)),
        "fastv mean": FastVConfig(layer=(second if second + 1 < depth else first) + 1, retention=0.4, query="mean"),
        "sparsevlm": SparseVLMConfig(behind, keep_ratios=(0.6,) * len(behind), **fewer(2)),
        "adaptive": SparseVLMConfig(behind, rank_scale=1.0),
        "random": RandomConfig(**prune, seed=3),
        "uniform": UniformConfig(**prune, **fewer(2)),
        **({"skipping and pruning": skipping(depth, **prune, **fewer(3), text_threshold=0.0)} if known.experts else {}),
    }


def prune_layers(family: str) -> tuple[int, ...]:
    """All that may."""
    rules, text, _ = find_text_model(pristine(family))
    moe = [number for number, layer in enumerate(text.layers) if rules.is_moe(layer)]
    return tuple(number for number in moe if not rules.why_not_prune(text.config, number))


@cache
def refused(family: str) -> dict[str, tuple[Any, type[Exception], str]]:
    """What `enable` does not take: the config or what is given for one, the error, a word of it."""
    depth, some = len(layers_of(pristine(family), family)), configs(family)["random"]
    found = {
        "prune layer": (FastMMoEConfig(prune_layers=(2, depth), retention=0.5), ValueError, "prune_layers"),
        "experts": (FastMMoEConfig(vision_top_k=5), ValueError, "vision_top_k"),
        "reduction layer": (FastMMoEConfig(vision_top_k=2, reduction_layer=depth), ValueError, "reduction_layer"),
        "fastv's layer": (FastVConfig(layer=depth), ValueError, "layer"),
        "type": ({"vision_top_k": 2}, TypeError, "config"),
        "training mode": (some, ValueError, "training"),
    }
    if not FAMILIES[family].known.experts:
        found["reduction layer"] = found["experts"]
    return found


def positions(mask: torch.Tensor) -> torch.Tensor:
    """As `generate` counts them: padding takes no part."""
    return (mask.cumsum(1) - 1).clamp_min(0)


# ------------------------------------------------------------------------------------------------ uses


class Use(NamedTuple):
    """One use of a model.

    Attributes:
        run: (model, family) -> output, of whichever type.
        oracle: another use with the same output, to the family's tolerance; None: the same use, bit for bit.
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
    return parent_of(model)(**batch_of(family, "left")).last_hidden_state


def _with_positions(model, family):
    batch = batch_of(family, "left")
    return model(**batch, position_ids=positions(batch["attention_mask"]))


def _placed(model: nn.Module, inputs: dict[str, torch.Tensor], where: torch.Tensor) -> dict[str, torch.Tensor]:
    """With position ids, if the model makes those in time, height and width from ids and a 2D mask alone."""
    return inputs | {"position_ids": where} if hasattr(parent_of(model), "rope_deltas") else inputs


def _embeddings(model, family):
    batch = batch_of(family, "right")
    batch = _placed(model, batch, positions(batch["attention_mask"]))
    return model(inputs_embeds=model.get_input_embeddings()(batch.pop("input_ids")), **batch)


def _fixed_layout(model, family):
    batch = batch_of(family, "left")
    layout = VisionLayout.from_mask(is_vision(family, batch["input_ids"]), batch["attention_mask"])
    with fastmmoe.fixed_layout(model, layout):
        return model(**batch)


def _packed(model, family):
    return model(**fastmmoe.pack_batch(batch_of(family, "left")))


def _valid_logits(model, family):
    batch = batch_of(family, "left")
    batch = _placed(model, batch, positions(batch["attention_mask"]))
    return model(**batch).logits[batch["attention_mask"].bool()]


def _causal_mask(model, family):
    """What the 2D mask means, in 4D."""
    batch = batch_of(family, "left")
    valid = batch["attention_mask"].bool()
    batch = _placed(model, batch, positions(batch["attention_mask"]))
    causal = torch.ones(2 * valid.shape[1:], dtype=torch.bool).tril()
    return model(**batch | {"attention_mask": (causal & valid.unsqueeze(1)).unsqueeze(1)}).logits[valid]


def _samples(family):
    return [batch_of(family, "one", seed) for seed in (1, 2)]


def _each_alone(model, family):
    alone = [sample | {"position_ids": positions(sample["attention_mask"])} for sample in _samples(family)]
    return torch.stack([model(**sample).logits[0, -1] for sample in alone])


def _in_one_row(model, family):
    """Two samples one behind the other, each of which sees itself alone."""
    samples = _samples(family)
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    row = {
        key: torch.cat([sample[key] for sample in samples], int(is_per_token(key) or key.startswith("images")))
        for key in samples[0]
    }
    mask = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()
    row["attention_mask"] = mask[None, None]
    row["position_ids"] = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    ends = torch.tensor(lengths).cumsum(0) - 1
    return model(**row).logits[0, ends]


def _two_turns(model, family):
    """A second turn with an image of its own, on the cache of the first."""
    first, second = (batch_of(family, "one", seed) for seed in (1, 2))
    cache = DynamicCache(config=model.config.get_text_config())
    n, total = first["input_ids"].shape[1], first["input_ids"].shape[1] + second["input_ids"].shape[1]
    place = torch.arange(total).unsqueeze(0)
    model(**_placed(model, first, place[:, :n]), past_key_values=cache, use_cache=True)
    second = _placed(model, second, place[:, n:]) | {"attention_mask": torch.ones_like(place)}
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


@cache
def uses_of(family: str) -> dict[str, Use]:
    """Those that the stock model can do: it raises nothing, and what it did before makes no difference to it.

    An oracle that is none for the stock model is left out.
    """
    found, used, answers = {}, fresh(family), {}
    for name, use in USES.items():
        if name == "fixed layout":  # nothing that a stock model does
            found[name] = use
            continue
        try:
            answers[name] = answer(fresh(family), family, use.run)
            answer(used, family, use.run)
        except Exception:  # whatever it is, it is transformers' own
            answers.pop(name, None)
            continue
        found[name] = use
        if use.oracle:
            oracle = answer(fresh(family), family, use.oracle)
            if differences(oracle, answers[name], FAMILIES[family].tolerance):
                found[name] = use._replace(oracle=None)
    for name, before in answers.items():
        if before.refusal or differences(answer(used, family, found[name].run), before):
            del found[name]
    return found


# what transformers and torch leave on modules
MARKS = ("_is_torch_compile", "_output_capturing_hooks_installed", "_previous_max_cache_length")


@cache
def kept_by_transformers(family: str) -> set[str]:
    """Attributes of modules in which a stock model keeps something of one call for the next."""
    model = fresh(family)
    for name in ("left", "greedy"):
        answer(model, family, USES[name].run)
    stock = dict(pristine(family).named_modules())
    return {
        key
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) is not type(vars(stock[name]).get(key)) and key not in MARKS
    }


# ------------------------------------------------------------------------------------------------ answers


class Answer(NamedTuple):
    tensors: list[torch.Tensor]
    report: dict | None = None
    refusal: str | None = None


def leaves(output: Any) -> Iterator[torch.Tensor]:
    """All tensors of an output, those of a cache included."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Cache):
        yield from leaves([vars(layer) for layer in output.layers])
    elif isinstance(output, Mapping):
        # one is on the model, where the last call of any thread leaves it
        yield from leaves([value for key, value in output.items() if key != "rope_deltas"])
    elif isinstance(output, tuple | list):
        yield from chain.from_iterable(leaves(value) for value in output)


@torch.no_grad()
def answer(model: nn.Module, family: str, run: Callable, reported: nn.Module | None = None) -> Answer:
    """What a use returns, and the report on `reported` afterwards, if there is one to ask for; or how it is refused."""
    try:
        tensors = list(leaves(run(model, family)))
    except ValueError as error:
        if not re.match(r"[a-z_]+: ", str(error)):  # of which argument
            raise
        return Answer([], refusal=str(error))
    return Answer(tensors, None if reported is None else fastmmoe.report(reported).to_dict())


@cache
def wanted(family: str, config: str | None, name: str, by_parent: bool = False) -> Answer:
    """The answer of a model on which nothing but this config was ever enabled."""
    use = uses_of(family)[name]

    def asked(run: Callable) -> Answer:
        model = fresh(family)
        handle = parent_of(model) if by_parent else model
        if config is not None:
            fastmmoe.enable(handle, configs(family)[config])
        return answer(model, family, run, handle if config is not None and use.sees else None)

    got = asked(use.run)
    return got if got.refusal or not use.oracle else asked(use.oracle)


def differences(got: Answer, want: Answer, tolerance: float | None = None) -> str | None:
    """What is not as it should be, in a line; without a tolerance, the bits are to be the same."""
    if got.refusal != want.refusal:
        return f"refusal {got.refusal!r}, expected {want.refusal!r}"
    if len(got.tensors) != len(want.tensors):
        return f"{len(got.tensors)} tensors, expected {len(want.tensors)}"
    for number, (have, wish) in enumerate(zip(got.tensors, want.tensors, strict=True)):
        if have.shape != wish.shape:
            return f"tensor {number} is {list(have.shape)}, expected {list(wish.shape)}"
        if not torch.equal(have, wish) if tolerance is None else not torch.allclose(have, wish, 1e-4, tolerance):
            off = (have.float() - wish.float()).abs().max().item()
            return f"tensor {number} is off by {off:.2g}, expected {tolerance or 'the same bits'}"
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
        fastmmoe.enable(model, configs(family)[config])
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


@cache
def bears_rows(family: str) -> bool:
    """Whether a stock model's cache can be cropped and its rows moved: all of its layers are plain ones."""
    _, cache = prefill(fresh(family), family, "left")
    return all(type(layer) is DynamicLayer for layer in cache.layers)


@cache
def bears_several_words(family: str) -> bool:
    """Whether a stock model decodes two words at once, behind padding too, as it does one by one."""
    model, mask = fresh(family), batch_of(family, "mixed")["attention_mask"]
    _, cache = prefill(model, family, "mixed")
    mask = torch.cat((mask, mask.new_ones(len(mask), 2)), 1)
    got = decode(model, cache, torch.tensor([WORDS[:2]] * len(mask)), mask)[:, -1]
    want = continued(family, None, "mixed", 0, WORDS[:2])
    return torch.allclose(got, want, 1e-4, FAMILIES[family].tolerance)


@cache
def can_be_offloaded(family: str) -> bool:
    """Whether a stock model can: not where a weight is read past its module."""
    from accelerate import cpu_offload

    model = fresh(family)
    cpu_offload(model, execution_device="cpu")
    try:
        got = {name: answer(model, family, uses_of(family)[name].run) for name in ("left", "text", "greedy")}
    except RuntimeError:
        return False
    tolerance = FAMILIES[family].tolerance
    return not any(differences(one, wanted(family, None, name), tolerance) for name, one in got.items())
