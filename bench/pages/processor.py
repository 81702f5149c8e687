"""The pages' model's processor: Qwen3-VL's, around the words of the questions."""

from __future__ import annotations

from pathlib import Path


def save_processor(directory: str | Path) -> None:
    raise NotImplementedError
