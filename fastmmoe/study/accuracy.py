"""How many answers are right, how sure that is, and whether two methods differ on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

import fastmmoe
from fastmmoe.families import architecture_of, find_text_model
from fastmmoe.families.chat import end_tokens
from fastmmoe.methods import FastMMoEConfig
from fastmmoe.study.answers import answer, reduced
from fastmmoe.study.methods import Method
from fastmmoe.study.prompts import Batch
from fastmmoe.study.questions import Example, matches


def evaluate(
    model: PreTrainedModel,
    processor: Any,
    examples: Sequence[Example],
    batches: Sequence[Batch],
    method: Method,
    *,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Ask all questions under a method, and count the FLOPs of the language model's prefills.

    Args:
        examples: the questions.
        batches: their prompts, see `make_batches`.

    Returns:
        A row: the method, `n`, `accuracy`, its `standard_error`, `types` (accuracy by type of question), `flops` (per
        prompt), `flops_ratio` (of the dense model's) and `right`, a 0 or a 1 for each question.
    """
    end, architecture = end_tokens(model, processor), architecture_of(find_text_model(model)[1].config)
    right = np.zeros(len(examples), dtype=bool)
    spent = dense = 0.0
    for number, batch in enumerate(batches):
        config = method.config_of(number)
        with reduced(model, config):
            said = answer(model, batch.to(model.device), None, max_new_tokens=max_new_tokens, end=end)
            counted = None if config is None else fastmmoe.report(model).flops
        for example, tokens in zip(batch.numbers, said, strict=True):
            text = processor.decode(tokens, skip_special_tokens=True)
            right[example] = matches(text, examples[example].answer)
        if counted is None:
            layout = batch.layout
            n_text = [length - n for length, n in zip(layout.lengths, layout.n_vision, strict=True)]
            counted = fastmmoe.flops(architecture, n_text, layout.n_vision, FastMMoEConfig())
        spent, dense = spent + counted.reduced, dense + counted.dense
    return {
        **method.describe(),
        "n": len(examples),
        "accuracy": float(right.mean()),
        "standard_error": binomial_error(right),
        "flops": spent / len(examples),
        "flops_ratio": spent / dense,
        "types": by_type(right, [example.type for example in examples]),
        "right": "".join("01"[correct] for correct in right.tolist()),
    }


def binomial_error(right: Sequence[bool] | np.ndarray) -> float:
    """Standard error of the share of right answers to independent questions: `sqrt(p (1 - p) / n)`."""
    share = float(np.mean(right))
    return (share * (1 - share) / len(right)) ** 0.5


def paired_difference(one: Sequence[bool] | np.ndarray, other: Sequence[bool] | np.ndarray) -> tuple[float, float]:
    """Accuracy of one method minus another's on the same questions, and its standard error.

    The error is that of the mean of the differences per question (sample standard deviation over sqrt(n)): questions
    that both get right, or both wrong, cost no certainty. It takes two questions at least.
    """
    differences = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    return float(differences.mean()), float(differences.std(ddof=1) / len(differences) ** 0.5)


def by_type(right: np.ndarray, types: Sequence[str]) -> dict[str, float]:
    """Accuracy for each type of question, in order of appearance; empty where questions have no types."""
    names = np.array(types)
    return {name: float(right[names == name].mean()) for name in dict.fromkeys(types) if name}


def answers_of(row: dict[str, Any]) -> np.ndarray:
    """A row's `right` as bool [n]."""
    return np.array([correct == "1" for correct in row["right"]])
