"""The same answers by transformers with `fastmmoe.enable`, one request at a time."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

import fastmmoe
from fastmmoe.prefill.installation import plan_in_force

from .prompts import ALL, Prompts


@cache
def _loaded(directory: Path) -> tuple[Any, Prompts]:
    config = AutoConfig.from_pretrained(directory)
    config = getattr(config, "thinker_config", config)
    model = AutoModelForImageTextToText.from_pretrained(directory, config=config, dtype=torch.float32).eval()
    return model, Prompts(directory)


def answer(directory: Path, name: str, values: dict[str, Any] | None) -> tuple[list[int], list[list[int]]]:
    """(generated ids, by stage the positions left of the prompt) of a case; `values` as in `additional_config`."""
    return _answer(directory, name, None if values is None else json.dumps(values, sort_keys=True))


@cache
def _answer(directory: Path, name: str, values: str | None) -> tuple[list[int], list[list[int]]]:
    model, prompts = _loaded(directory)
    case = ALL[name]
    inputs = prompts.inputs(case)
    end = model.generation_config.eos_token_id if case.stops else None
    settings = GenerationConfig(max_new_tokens=case.new_tokens, do_sample=False, eos_token_id=end, pad_token_id=0)
    if values is not None:
        fastmmoe.enable(model, fastmmoe.FastMMoEConfig.preset(model, **json.loads(values)))
    try:
        output = model.generate(**inputs, generation_config=settings)
        left = _positions_left(model) if values is not None and case.has_vision else []
    finally:
        fastmmoe.disable(model)
    return output[0, inputs["input_ids"].shape[1] :].tolist(), left


@cache
def prompt_of(directory: Path, name: str) -> tuple[int, tuple[tuple[int, int], ...]]:
    """(length, [start, end) of runs of vision tokens) of a case's prompt."""
    model, prompts = _loaded(directory)
    ids = prompts.inputs(ALL[name])["input_ids"][0]
    places = (model.config.image_token_id, getattr(model.config, "video_token_id", None))
    vision = sum(ids == place for place in places if place is not None).int()
    edges = torch.nn.functional.pad(vision, (1, 1)).diff().nonzero().flatten().tolist()
    return len(ids), tuple(zip(edges[::2], edges[1::2], strict=True))


def _positions_left(model: Any) -> list[list[int]]:
    """By stage: positions of the last prefill's tokens behind it; a merged window stands at its first token."""
    return [segment.index[0].tolist() for segment in plan_in_force(model).last[1:] if segment.index is not None]
