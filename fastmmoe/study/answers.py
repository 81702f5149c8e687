"""Greedy answers of a model to batches of prompts, under a method or under none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

import fastmmoe
from fastmmoe.config import ReductionConfig
from fastmmoe.prefill.cache import CACHE, cache_in
from fastmmoe.prefill.installation import plan_in_force
from fastmmoe.study.prompts import Batch, handed


@contextmanager
def reduced(model: PreTrainedModel, config: ReductionConfig | None) -> Iterator[None]:
    """The model under a config within a `with` block; None: the model as it is."""
    if config is None:
        yield
        return
    with fastmmoe.enabled(model, config):
        yield


def prefill(model: PreTrainedModel, batch: Batch, *, use_cache: bool = True) -> Any:
    """The language model's forward over a batch: the model's output, with logits [B, 1, V] of the next token.

    On an enabled model it is a prefill with the batch's vision tokens.
    """
    inputs = batch.inputs | {"use_cache": use_cache, "logits_to_keep": 1}
    is_reduced = plan_in_force(model) is not None
    told = fastmmoe.fixed_layout(model, batch.layout) if is_reduced else nullcontext()
    with handed(model, batch.further), told:
        return model(**inputs)


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    batch: Batch,
    config: ReductionConfig | None,
    *,
    max_new_tokens: int,
    end: tuple[int, ...],
) -> list[list[int]]:
    """Greedy answers, token ids without the end token; decoding stops when every prompt has its answer.

    Args:
        batch: on the model's device.
        config: what is reduced; None answers with the model as it is, enabled or not.
        max_new_tokens: an answer's length at most.
        end: ids that end an answer.
    """
    if batch.samples:
        return _generated(model, batch, config, max_new_tokens, end)
    ends = torch.tensor(end, dtype=torch.int64, device=batch.embeddings.device)
    mask, position = batch.attention_mask, batch.position_ids[..., -1:]
    said = []
    with reduced(model, config):
        output = prefill(model, batch)
        is_done = torch.zeros(len(batch.numbers), dtype=torch.bool, device=ends.device)
        while True:
            token = output.logits[:, -1].argmax(-1)
            said.append(token)
            is_done |= torch.isin(token, ends)
            if len(said) == max_new_tokens or is_done.all():
                break
            position = position + 1
            if mask is not None:
                mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
            output = model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=position,
                use_cache=True,
                **{CACHE: cache_in(output)},
            )
    return [_until(row, end) for row in torch.stack(said, 1).tolist()]


def _generated(
    model: PreTrainedModel, batch: Batch, config: ReductionConfig | None, max_new_tokens: int, end: tuple[int, ...]
) -> list[list[int]]:
    """Where the model alone knows how positions go on behind an image."""
    with reduced(model, config):
        tokens = model.generate(
            **batch.inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(end) or None,
            pad_token_id=end[0] if end else None,
        )
    return [_until(row, end) for row in tokens[:, batch.layout.width :].tolist()]


def _until(tokens: list[int], end: tuple[int, ...]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in end), len(tokens))]
