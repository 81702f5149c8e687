"""The model that VLMEvalKit asks: one question at a time, under any method."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from vlmeval.vlm.base import BaseModel

from fastmmoe.config import ReductionConfig
from fastmmoe.families.checkpoint import load_model
from fastmmoe.families.fingerprint import gates_sha256
from fastmmoe.families.images import open_image
from fastmmoe.families.processors import load_processor
from fastmmoe.harnesses.answers import Answerer


class FastMMoE(BaseModel):
    """A supported checkpoint, dense or under a method.

    Args:
        checkpoint: directory or hub id.
        config: None: dense.
        gates: `gates_sha256` of the model that the config was calibrated for; None: it was for none.
        max_new_tokens: of an answer.
        costs: a file to which what every answer took is added, as a line of JSON.
        device, dtype: to run on and in; `device` "auto" is a GPU where there is one.
        engines: whether to run in other engines, which VLMEvalKit tells models of some names.

    Raises:
        ValueError: the config does not fit the checkpoint, or is another's, or another engine is asked for.
    """

    INTERLEAVE = True
    allowed_types = ["text", "image"]

    def __init__(
        self,
        checkpoint: str,
        config: ReductionConfig | None,
        gates: str | None,
        max_new_tokens: int,
        costs: Path,
        device: str = "auto",
        dtype: str = "auto",
        **engines: bool,
    ):
        super().__init__()
        if asked := [name for name, is_asked in engines.items() if is_asked]:
            raise ValueError(f"{', '.join(asked)}: not supported, expected transformers")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(checkpoint, dtype, device)
        if gates not in (None, own := gates_sha256(model)):
            raise ValueError(f"--reduction: is of another model (gates {gates[:12]}, expected {own[:12]})")
        self.answerer = Answerer(model, load_processor(checkpoint))
        self.answerer.use(config)
        self.max_new_tokens, self.costs = max_new_tokens, costs

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """Answer a message of texts and of pictures' paths.

        Raises:
            OSError: a picture cannot be read.
            ValueError: the model's template does not take the message.
        """
        content = [
            {"type": "image", "image": open_image(Path(part["value"]))}
            if part["type"] == "image"
            else {"type": "text", "text": part["value"]}
            for part in message
        ]
        conversation = [{"role": "user", "content": content}]
        before = replace(self.answerer.costs)
        (answer,) = self.answerer.answer([conversation], max_new_tokens=self.max_new_tokens, do_sample=False)
        question = hashlib.sha256(json.dumps(message).encode()).hexdigest()[:16]
        spent = {"dataset": dataset, "question": question, **asdict(self.answerer.costs - before)}
        with self.costs.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(spent)}\n")
        return answer.text
