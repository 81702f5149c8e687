"""Prompts in batches, as the language model gets them: embeddings, the vision features among them.

The vision tower runs once per picture, whatever number of methods then answers. Positions in an image (M-RoPE) and
features for later layers (DeepStack) are kept beside the embeddings: there it runs once per question. A language model
that needs still more gets it from the whole model, which then runs for every method, vision tower and all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fastmmoe.families import find_text_model
from fastmmoe.families.chat import build_inputs
from fastmmoe.study.questions import Example
from fastmmoe_kernels import VisionLayout

# a text model's arguments that every batch makes for itself
OWN = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "cache")
# a text model's further arguments, by name: per token, or of the vision tokens alone for some layers each
Further = Mapping[str, torch.Tensor | tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Prompt:
    """One question, on the CPU.

    Attributes:
        embeddings: the language model's input [n, H]; None where only the whole model knows all that it needs.
        vision: which of it is vision tokens, bool [n].
        position_ids: int64 [n], or [axes, n]; None with `inputs`.
        further: arguments per token [n], or per vision token, a tuple of [vision tokens, H].
        inputs: without embeddings, the whole model's, of one sample.
    """

    embeddings: torch.Tensor | None
    vision: torch.Tensor
    position_ids: torch.Tensor | None = None
    further: Further = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class Batch:
    """Some prompts, padded on the left.

    Attributes:
        numbers: which prompts.
        embeddings: [B, n, H]; None where only the whole model knows all that the language model needs.
        attention_mask: int64 [B, n], 0 at padding; None without any.
        position_ids: int64 [B, n], or [axes, B, n]; 0 at padding.
        layout: where the vision tokens are.
        further: arguments per token [B, n], 0 at padding, or per vision token, a tuple of [those of all prompts, H].
        samples: without embeddings, the whole model's inputs of each prompt; () elsewhere.
    """

    numbers: tuple[int, ...]
    embeddings: torch.Tensor | None
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    layout: VisionLayout
    further: Further = field(default_factory=dict)
    samples: tuple[dict[str, torch.Tensor], ...] = ()

    def to(self, device: torch.device) -> Batch:
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        embeddings = None if self.embeddings is None else self.embeddings.to(device)
        positions, layout = self.position_ids.to(device), self.layout.to(device)
        further = _each(self.further, lambda value: value.to(device), lambda value: value.to(device))
        samples = tuple({name: value.to(device) for name, value in sample.items()} for sample in self.samples)
        return Batch(self.numbers, embeddings, mask, positions, layout, further, samples)

    def first(self, count: int) -> Batch:
        """The first `count` prompts; padding that all of them have stays."""
        mask = None if self.attention_mask is None else self.attention_mask[:count]
        return self._some(slice(count), slice(None), mask)

    def alone(self) -> list[Batch]:
        """Every prompt as a batch of its own, without padding; tensors are views of this batch's."""
        starts = (self.layout.width - length for length in self.layout.lengths)
        return [self._some(slice(row, row + 1), slice(start, None), None) for row, start in enumerate(starts)]

    def _some(self, rows: slice, tokens: slice, mask: torch.Tensor | None) -> Batch:
        layout = VisionLayout.from_mask(self.layout.vision_mask[rows, tokens], mask)
        embeddings = None if self.embeddings is None else self.embeddings[rows, tokens]
        ends = [0, *itertools.accumulate(self.layout.n_vision)]
        vision = slice(ends[rows.start or 0], ends[min(rows.stop, len(ends) - 1)])
        further = _each(self.further, lambda value: value[rows, tokens], lambda value: value[vision])
        positions = self.position_ids[..., rows, tokens]
        return Batch(self.numbers[rows], embeddings, mask, positions, layout, further, self.samples[rows])

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the whole model is called with: per token padded on the left, features one behind the other.

        Beside embeddings it is handed `further`, see `handed`.
        """
        if self.embeddings is not None:
            return {
                "inputs_embeds": self.embeddings,
                "attention_mask": self.attention_mask,
                "position_ids": self.position_ids,
            }
        width, made = self.layout.width, {}
        for name in self.samples[0]:
            rows = [sample[name] for sample in self.samples]
            if all(row.shape == sample["input_ids"].shape for row, sample in zip(rows, self.samples, strict=True)):
                rows = [torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows]
            made[name] = torch.cat(rows)
        return made

    @property
    def valid_mask(self) -> torch.Tensor:
        """bool [B, n], false at padding."""
        if self.attention_mask is None:
            return torch.ones_like(self.layout.vision_mask)
        return self.attention_mask.bool()


class _Reached(Exception):
    """The text model was called: what stands in front of it is done."""


@torch.inference_mode()
def encode(model: PreTrainedModel, processor: Any, examples: Iterable[Example]) -> list[Prompt]:
    """Every question as one user turn, the picture in front, through the processor's chat template.

    Raises:
        ValueError: a model that FastMMoE does not support, or a processor that makes no vision tokens.
    """
    family, text, parent = find_text_model(model)
    features: dict[Path, torch.Tensor] = {}  # picture -> [its vision tokens, H], of models that need no more
    prompts = []
    for example in examples:
        inputs = build_inputs(model, processor, [example.open_image()], example.question)
        vision = family.find_vision(parent, inputs)
        if vision is None or not vision.any():
            raise ValueError(f"processor: {type(processor).__name__} made no vision tokens of a picture")
        vision = vision.cpu()
        known = features.get(example.image) if isinstance(example.image, Path) else None
        if known is None:
            prompt = _prompt(_text_arguments(model, text, inputs), vision, inputs)
            is_plain = prompt.embeddings is not None and prompt.position_ids.dim() == 1 and not prompt.further
            if isinstance(example.image, Path) and is_plain:
                features[example.image] = prompt.embeddings[prompt.vision]
        else:
            embeddings = model.get_input_embeddings()(inputs["input_ids"]).cpu()
            embeddings[vision] = known
            prompt = Prompt(embeddings[0], vision[0].cpu(), torch.arange(vision.shape[1]))
        prompts.append(prompt)
    return prompts


def make_batches(prompts: Sequence[Prompt], size: int) -> list[Batch]:
    """Batches of `size` prompts, like lengths together: little padding, and mostly none."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].vision))
    return [_batch(prompts, tuple(order[start : start + size])) for start in range(0, len(order), size)]


def typical(batches: Sequence[Batch]) -> Batch:
    """The prompt of median length, alone; of two in the middle, the longer."""
    prompts = [(length, batch, row) for batch in batches for row, length in enumerate(batch.layout.lengths)]
    _, batch, row = sorted(prompts, key=lambda prompt: prompt[0])[len(prompts) // 2]
    return batch.alone()[row]


def _batch(prompts: Sequence[Prompt], numbers: tuple[int, ...]) -> Batch:
    def stack(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_side="left")

    chosen = [prompts[number] for number in numbers]
    vision = stack([prompt.vision for prompt in chosen])
    valid = stack([torch.ones(len(prompt.vision), dtype=torch.int64) for prompt in chosen])
    mask = None if valid.all() else valid
    layout = VisionLayout.from_mask(vision, mask)
    if chosen[0].inputs is not None:
        positions = (valid.cumsum(1) - 1).clamp_min(0)
        return Batch(numbers, None, mask, positions, layout, samples=tuple(prompt.inputs for prompt in chosen))
    positions = stack([prompt.position_ids.movedim(-1, 0) for prompt in chosen])  # [B, n] or [B, n, axes]
    positions = positions if positions.dim() == 2 else positions.permute(2, 0, 1)
    further = {}
    for name, value in chosen[0].further.items():
        each = [prompt.further[name] for prompt in chosen]
        is_per_token = isinstance(value, torch.Tensor)
        further[name] = stack(each) if is_per_token else tuple(map(torch.cat, zip(*each, strict=True)))
    return Batch(numbers, stack([prompt.embeddings for prompt in chosen]), mask, positions, layout, further)


@contextmanager
def handed(model: PreTrainedModel, further: Further) -> Iterator[None]:
    """Within a `with` block, a model hands its text model these arguments, whatever it makes of its own inputs."""
    if not further:
        yield
        return
    more = {name: value if isinstance(value, torch.Tensor) else list(value) for name, value in further.items()}
    handle = find_text_model(model)[1].register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | more), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def _prompt(arguments: dict[str, Any], vision: torch.Tensor, inputs: dict[str, torch.Tensor]) -> Prompt:
    """A prompt from what a model calls its text model with for `inputs`; vision bool [1, n]."""
    shape, count = vision.shape, int(vision.sum())
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    positions = torch.arange(shape[1])[None] if positions is None else positions
    # a mask of the model's own making cannot be stacked
    is_known = (mask is None or _is_of(mask, shape)) and _is_of(positions, shape, (*positions.shape[:1], *shape))
    further: dict[str, torch.Tensor | tuple[torch.Tensor, ...]] = {}
    for name, value in arguments.items():
        if name in OWN or value is None or isinstance(value, (bool, int, float, str)):
            continue
        if _is_of(value, shape):
            further[name] = value[0].cpu()
        elif isinstance(value, (list, tuple)) and all(torch.is_tensor(one) and len(one) == count for one in value):
            further[name] = tuple(one.cpu() for one in value)
        else:
            is_known = False
    if not is_known:
        return Prompt(None, vision[0], inputs={name: value.cpu() for name, value in inputs.items()})
    return Prompt(arguments["inputs_embeds"][0].cpu(), vision[0], positions[..., 0, :].cpu(), further)


def _is_of(value: Any, *shapes: tuple[int, ...]) -> bool:
    return isinstance(value, torch.Tensor) and value.shape in shapes


def _each(
    further: Further,
    per_token: Callable[[torch.Tensor], torch.Tensor],
    per_vision: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor | tuple[torch.Tensor, ...]]:
    """Arguments, each changed according to what it is about."""
    return {
        name: per_token(value) if isinstance(value, torch.Tensor) else tuple(map(per_vision, value))
        for name, value in further.items()
    }


def _text_arguments(model: PreTrainedModel, text: torch.nn.Module, inputs: dict) -> dict[str, Any]:
    """What a model calls its text model with for `inputs`; `inputs_embeds` is [1, n, H]."""
    seen = []

    def stop(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(kwargs)
        raise _Reached

    handle = text.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]
