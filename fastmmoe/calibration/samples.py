"""Prompts with their right answers behind them, and what a model makes of the answers' tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

import fastmmoe
from fastmmoe.families import find_text_model
from fastmmoe.families.chat import end_tokens
from fastmmoe.families.family import find_tokens
from fastmmoe.prefill.installation import plan_in_force
from fastmmoe.study.prompts import Further, Prompt, encode, handed
from fastmmoe.study.questions import Example
from fastmmoe_kernels import VisionLayout


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer, one row of n tokens without padding, on the model's device.

    Attributes:
        inputs: what the whole model is called with.
        further: what it then hands its text model, see `fastmmoe.study.prompts`.
        masks: bool [1, n], which tokens are "text" and which "vision"; special tokens are neither.
        answer: tokens of the answer, at the end of the row.
    """

    inputs: dict[str, Any]
    further: Further
    masks: dict[str, torch.Tensor]
    answer: int


@torch.inference_mode()
def make_samples(
    model: PreTrainedModel, processor: Any, examples: Iterable[Example], special: tuple[int, ...]
) -> Iterator[Sample]:
    """One sample per question, its answer ended as the model ends its own.

    Args:
        special: ids of the tokens that are neither text nor vision.

    Raises:
        ValueError: as `fastmmoe.study.prompts.encode`.
    """
    parent, ends = find_text_model(model)[2], end_tokens(model, processor)[:1]
    for example in examples:
        prompt = encode(model, processor, [example])[0]
        ids = processor.tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        answer = torch.tensor([[*ids, *ends]], device=model.device)
        further: Further = {}
        if prompt.embeddings is not None:
            inputs, further = _embedded(model, prompt, answer)
        else:
            inputs = _extended({name: value.to(model.device) for name, value in prompt.inputs.items()}, answer)
        vision = torch.nn.functional.pad(prompt.vision, (0, answer.shape[1])).unsqueeze(0).to(model.device)
        text = ~vision
        if special:
            text &= ~find_tokens(parent, inputs, special)
        yield Sample(inputs, further, {"text": text, "vision": vision}, answer.shape[1])


@torch.inference_mode()
def answer_log_probs(model: PreTrainedModel, sample: Sample) -> torch.Tensor:
    """What a model takes each of the answer's tokens for, given those in front of it: float64 [tokens, V]."""
    inputs = sample.inputs | {"use_cache": False}
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        inputs["logits_to_keep"] = sample.answer + 1
    told = nullcontext()
    if plan_in_force(model) is not None and "inputs_embeds" in inputs:
        told = fastmmoe.fixed_layout(model, VisionLayout.from_mask(sample.masks["vision"]))
    with handed(model, sample.further), told:
        logits = model(**inputs).logits[0, -sample.answer - 1 : -1]
    # the divergences of most layers are small differences
    return logits.double().log_softmax(-1)


def divergence(dense: torch.Tensor, other: torch.Tensor) -> float:
    """KL(dense || other), summed over tokens, of log-probabilities [tokens, V]; rounding makes it no less than 0."""
    return float((dense.exp() * (dense - other)).sum(-1).clamp_min(0.0).sum())


def _embedded(model: PreTrainedModel, prompt: Prompt, answer: torch.Tensor) -> tuple[dict[str, Any], Further]:
    """A prompt's embeddings with those of an answer behind it, and what else the text model needs."""
    device, count = model.device, answer.shape[1]
    row = torch.cat((prompt.embeddings.to(device)[None], model.get_input_embeddings()(answer)), 1)
    # text goes on by one in every axis
    steps = torch.arange(1, count + 1)
    positions = torch.cat((prompt.position_ids, prompt.position_ids[..., -1:] + steps), -1).unsqueeze(-2)
    further = {
        name: torch.nn.functional.pad(value, (0, count))[None].to(device)
        if isinstance(value, torch.Tensor)
        else tuple(one.to(device) for one in value)
        for name, value in prompt.further.items()
    }
    return {"inputs_embeds": row, "position_ids": positions.to(device)}, further


def _extended(inputs: dict[str, torch.Tensor], answer: torch.Tensor) -> dict[str, torch.Tensor]:
    """A prompt's inputs with an answer behind it: what there is per token grows with it."""
    shape, extended = inputs["input_ids"].shape, dict(inputs)
    for name, value in inputs.items():
        if name == "input_ids":
            extended[name] = torch.cat((value, answer), 1)
        elif value.shape == shape:
            fill = 1 if name == "attention_mask" else 0
            extended[name] = torch.nn.functional.pad(value, (0, answer.shape[1]), value=fill)
    return extended
