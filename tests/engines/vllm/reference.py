"""The same answers by transformers with `fastmmoe.enable`, one request at a time."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

import fastmmoe
from fastmmoe.prefill.installation import plan_in_force

from .prompts import CASES, Prompts


@cache
def _loaded(directory: Path) -> tuple[Any, Prompts]:
    config = AutoConfig.from_pretrained(directory)
    config = getattr(config, "thinker_config", config)
    model = AutoModelForImageTextToText.from_pretrained(directory, config=config, dtype=torch.float32).eval()
    return model, Prompts(directory)


def answer(directory: Path, name: str, values: dict[str, Any] | None) -> tuple[list[int], list[list[int]]]:
    """(generated ids, by stage the positions left of the prompt) of a case; `values` as in `additional_config`."""
    key = None if values is None else tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in values.items()))
    return _answer(directory, name, key)


@cache
def _answer(directory: Path, name: str, values: tuple | None) -> tuple[list[int], list[list[int]]]:
    model, prompts = _loaded(directory)
    case = CASES[name]
    inputs = prompts.inputs(case)
    end = model.generation_config.eos_token_id if case.stops else None
    settings = GenerationConfig(max_new_tokens=case.new_tokens, do_sample=False, eos_token_id=end, pad_token_id=0)
    if values is not None:
        fastmmoe.enable(model, fastmmoe.FastMMoEConfig.preset(model, **dict(values)))
    try:
        output = model.generate(**inputs, generation_config=settings)
        left = _positions_left(model) if values is not None and case.sizes else []
    finally:
        fastmmoe.disable(model)
    return output[0, inputs["input_ids"].shape[1] :].tolist(), left


def _positions_left(model: Any) -> list[list[int]]:
    """By stage: positions of the last prefill's tokens behind it; a merged window stands at its first token."""
    return [segment.index[0].tolist() for segment in plan_in_force(model).last[1:] if segment.index is not None]
