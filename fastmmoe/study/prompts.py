"""Prompts as the language model gets them: embeddings, the vision features among them, in batches.

The vision tower runs once per picture, whatever number of methods then answers.
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
    """One question: the language model's input [n, H], on the CPU, and which of it is vision tokens, bool [n]."""

    embeddings: torch.Tensor
    vision: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """Some prompts, padded on the left.

    Attributes:
        numbers: which prompts.
        embeddings: [B, n, H].
        attention_mask: int64 [B, n], 0 at padding; None without any.
        position_ids: int64 [B, n], from 0 at a prompt's first token.
        layout: where the vision tokens are.
    """

    numbers: tuple[int, ...]
    embeddings: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    layout: VisionLayout

    def to(self, device: torch.device) -> Batch:
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        embeddings, positions = self.embeddings.to(device), self.position_ids.to(device)
        return Batch(self.numbers, embeddings, mask, positions, self.layout.to(device))

    def first(self, count: int) -> Batch:
        """The first `count` prompts; padding that all of them have stays."""
        mask = None if self.attention_mask is None else self.attention_mask[:count]
        layout = VisionLayout.from_mask(self.layout.vision_mask[:count], mask)
        return Batch(self.numbers[:count], self.embeddings[:count], mask, self.position_ids[:count], layout)

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
    prompts = []
    for example in examples:
        inputs = build_inputs(model, processor, [example.open_image()], example.question)
        vision = family.find_vision(parent, inputs)
        if vision is None or not vision.any():
            raise ValueError(f"processor: {type(processor).__name__} made no vision tokens of a picture")
        known = features.get(example.image) if isinstance(example.image, Path) else None
        if known is not None:
            embeddings = model.get_input_embeddings()(inputs["input_ids"])
            embeddings[vision] = known
        else:
            embeddings = _text_input(model, text, inputs)
            if isinstance(example.image, Path):
                features[example.image] = embeddings[vision]
        prompts.append(Prompt(embeddings[0].cpu(), vision[0].cpu()))
    return prompts


def make_batches(prompts: Sequence[Prompt], size: int) -> list[Batch]:
    """Batches of `size` prompts, like lengths together: little padding, and mostly none."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].vision))
    return [_batch(prompts, tuple(order[start : start + size])) for start in range(0, len(order), size)]


def _batch(prompts: Sequence[Prompt], numbers: tuple[int, ...]) -> Batch:
    def stack(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_side="left")

    chosen = [prompts[number] for number in numbers]
    vision = stack([prompt.vision for prompt in chosen])
    valid = stack([torch.ones(len(prompt.vision), dtype=torch.int64) for prompt in chosen])
    mask = None if valid.all() else valid
    layout = VisionLayout.from_mask(vision, mask)
    positions = (valid.cumsum(1) - 1).clamp_min(0)
    return Batch(numbers, stack([prompt.embeddings for prompt in chosen]), mask, positions, layout)


def _text_input(model: PreTrainedModel, text: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """What a model hands its text model for `inputs`, [1, n, H]."""
    seen = []

    def stop(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(kwargs["inputs_embeds"])
        raise _Reached

    handle = text.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]
