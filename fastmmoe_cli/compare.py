"""One prompt through a model with FastMMoE off and on: answers, prefill times, and what the prefill did."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

import fastmmoe
from fastmmoe.families.chat import end_tokens
from fastmmoe.methods import FastMMoEConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastmmoe.report import PrefillReport


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; times are in seconds, the medians of `runs` runs each, None without any."""

    config: FastMMoEConfig
    report: PrefillReport
    dense_prefill: float | None
    fast_prefill: float | None
    runs: int
    dense_answer: str
    fast_answer: str

    def to_dict(self) -> dict:
        """The same as a JSON-able dict."""
        return {
            "config": self.config.to_dict(),
            "report": self.report.to_dict(),
            "prefill_seconds": {"dense": self.dense_prefill, "fastmmoe": self.fast_prefill, "runs": self.runs},
            "answers": {"dense": self.dense_answer, "fastmmoe": self.fast_answer},
        }


def compare(
    model: PreTrainedModel,
    processor: Any,
    inputs: dict,
    config: FastMMoEConfig,
    *,
    max_new_tokens: int = 32,
    runs: int = 5,
    step: Callable[[str], None] = lambda name: None,
) -> Comparison:
    """Answer greedily and time the prefill, with FastMMoE off and on.

    A prefill is one forward pass over the whole prompt, vision tower included, up to the first token's logits. The
    answers warm both ways up, then the timed runs alternate, so that a change of clock or load meets both alike.

    Args:
        inputs: of one sample, see `fastmmoe.families.chat.build_inputs`.
        max_new_tokens: length of the answers.
        runs: timed prefills of each way; 0 times none.
        step: called with a few words before every step; there are `2 + runs` of them.

    Raises:
        ValueError, TypeError: a model or a config that FastMMoE does not support.
    """
    end = list(end_tokens(model, processor)) or None

    @torch.inference_mode()
    def answer() -> str:
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end)
        return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    @torch.inference_mode()
    def prefill() -> float:
        _wait(model.device)
        start = time.perf_counter()
        model(**inputs, logits_to_keep=1, use_cache=True)
        _wait(model.device)
        return time.perf_counter() - start

    step("answering without FastMMoE")
    dense_answer = answer()
    step("answering with FastMMoE")
    with fastmmoe.enabled(model, config):
        fast_answer = answer()
        report = fastmmoe.report(model)
    dense, fast = [], []
    for run in range(runs):
        step(f"timing prefills, {run + 1} of {runs}")
        dense.append(prefill())
        with fastmmoe.enabled(model, config):
            fast.append(prefill())
    times = (median(dense), median(fast)) if runs else (None, None)
    return Comparison(config, report, *times, runs, dense_answer, fast_answer)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
