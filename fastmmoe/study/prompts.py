"""Prompts in batches, as the language model gets them: embeddings, the vision features among them.

The vision tower runs once per picture, whatever number of methods then answers. A language model that needs more than
embeddings and their order (positions in an image, features for its later layers) gets them from the whole model, which
then runs for every method, vision tower and all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fastmmoe.families import find_text_model
from fastmmoe.families.chat import build_inputs
from fastmmoe.study.questions import Example
from fastmmoe_kernels import VisionLayout


@dataclass(frozen=True)
class Prompt:
    """One question, on the CPU.

    Attributes:
        embeddings: the language model's input [n, H]; None where that needs more.
        vision: which of it is vision tokens, bool [n].
        inputs: where it needs more, the whole model's, of one sample.
    """

    embeddings: torch.Tensor | None
    vision: torch.Tensor
    inputs: dict[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class Batch:
    """Some prompts, padded on the left.

    Attributes:
        numbers: which prompts.
        embeddings: [B, n, H]; None where the language model needs more.
        attention_mask: int64 [B, n], 0 at padding; None without any.
        position_ids: int64 [B, n], from 0 at a prompt's first token.
        layout: where the vision tokens are.
        samples: where the language model needs more, the whole model's inputs of each prompt; () elsewhere.
    """

    numbers: tuple[int, ...]
    embeddings: torch.Tensor | None
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    layout: VisionLayout
    samples: tuple[dict[str, torch.Tensor], ...] = ()

    def to(self, device: torch.device) -> Batch:
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        embeddings = None if self.embeddings is None else self.embeddings.to(device)
        samples = tuple({name: value.to(device) for name, value in sample.items()} for sample in self.samples)
        return Batch(self.numbers, embeddings, mask, self.position_ids.to(device), self.layout.to(device), samples)

    def first(self, count: int) -> Batch:
        """The first `count` prompts; padding that all of them have stays."""
        mask = None if self.attention_mask is None else self.attention_mask[:count]
        layout = VisionLayout.from_mask(self.layout.vision_mask[:count], mask)
        embeddings = None if self.embeddings is None else self.embeddings[:count]
        return Batch(self.numbers[:count], embeddings, mask, self.position_ids[:count], layout, self.samples[:count])

    def alone(self) -> list[Batch]:
        """Every prompt as a batch of its own, without padding; tensors are views of this batch's."""
        found = []
        for row, length in enumerate(self.layout.lengths):
            one, tokens = slice(row, row + 1), slice(self.layout.width - length, None)
            layout = VisionLayout.from_mask(self.layout.vision_mask[one, tokens])
            embeddings = None if self.embeddings is None else self.embeddings[one, tokens]
            positions = self.position_ids[one, tokens]
            found.append(Batch(self.numbers[one], embeddings, None, positions, layout, self.samples[one]))
        return found

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the whole model is called with: per token padded on the left, features one behind the other."""
        if self.embeddings is not None:
            return {
                "inputs_embeds": self.embeddings,
                "attention_mask": self.attention_mask,
                "position_ids": self.position_ids,
            }
        width, made = self.position_ids.shape[1], {}
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
            return torch.ones_like(self.position_ids, dtype=torch.bool)
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
    features: dict[Path, torch.Tensor] = {}  # picture -> [its vision tokens, H]
    prompts, is_enough = [], None
    for example in examples:
        inputs = build_inputs(model, processor, [example.open_image()], example.question)
        vision = family.find_vision(parent, inputs)
        if vision is None or not vision.any():
            raise ValueError(f"processor: {type(processor).__name__} made no vision tokens of a picture")
        if is_enough is None:
            is_enough = _is_embeddings_alone(_text_arguments(model, text, inputs))
        if not is_enough:
            prompts.append(Prompt(None, vision[0].cpu(), {name: value.cpu() for name, value in inputs.items()}))
            continue
        known = features.get(example.image) if isinstance(example.image, Path) else None
        if known is not None:
            embeddings = model.get_input_embeddings()(inputs["input_ids"])
            embeddings[vision] = known
        else:
            embeddings = _text_arguments(model, text, inputs)["inputs_embeds"]
            if isinstance(example.image, Path):
                features[example.image] = embeddings[vision]
        prompts.append(Prompt(embeddings[0].cpu(), vision[0].cpu()))
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
    positions = (valid.cumsum(1) - 1).clamp_min(0)
    if chosen[0].inputs is not None:
        return Batch(numbers, None, mask, positions, layout, tuple(prompt.inputs for prompt in chosen))
    return Batch(numbers, stack([prompt.embeddings for prompt in chosen]), mask, positions, layout)


def _is_embeddings_alone(arguments: dict[str, Any]) -> bool:
    """Whether what a text model is called with follows from its embeddings and their order."""
    positions = arguments.get("position_ids")
    known = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "cache")
    others = (value for name, value in arguments.items() if name not in known)
    is_plain = all(value is None or isinstance(value, (bool, int, float, str)) for value in others)
    return is_plain and (positions is None or positions.dim() == 2)


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
