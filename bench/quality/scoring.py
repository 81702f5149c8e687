"""Many questions about a picture in one packed sequence, and how many of the answers are right."""

from collections import defaultdict
from dataclasses import dataclass

import torch

IGNORE = -100  # cross entropy's default

Record = tuple[int, str, bool]  # number of the picture, type of the question, right


@dataclass(frozen=True)
class Packed:
    """B pictures with their questions packed behind them: a question sees its picture and itself.

    `ids` [B, L], `steps` [B, L] a token's place in its question (0 elsewhere), `mask` bool [B, 1, L, L] (true: may
    look), `labels` [B, L] with the next token where it is part of an answer, `owner` [B, L] the number of the question
    that a token belongs to (-1: none), `types` the number of every question's type, questions in the order of `owner`.
    """

    ids: torch.Tensor
    steps: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    owner: torch.Tensor
    types: torch.Tensor


Asked = tuple[list[int], list[int], int]  # tokens of a question, of its answer, and number of its type


def pack_questions(picture: list[int], asked: list[list[Asked]], eos: int, pad: int) -> Packed:
    """The questions asked about each of B pictures, all of which are the same tokens."""
    prefix, rows, types = len(picture), [], []
    for questions in asked:
        ids, steps, labels, owner = list(picture), [0] * prefix, [IGNORE] * prefix, [-1] * prefix
        for prompt, answer, number in questions:
            ids += prompt + answer
            steps += range(len(prompt) + len(answer))
            labels += [IGNORE] * (len(prompt) - 1) + answer + [eos]
            owner += [len(types)] * (len(prompt) + len(answer))
            types.append(number)
        rows.append((ids, steps, labels, owner))
    length = max(len(ids) for ids, *_ in rows)
    ids, steps, labels, owner = (
        torch.tensor([values + [fill] * (length - len(values)) for values in column])
        for column, fill in zip(zip(*rows, strict=True), (pad, 0, IGNORE, -1), strict=True)
    )
    order = torch.arange(length)
    mask = (order < prefix) | (owner[:, None, :] == owner[:, :, None])
    mask = (mask & (order <= order[:, None]))[:, None]
    return Packed(ids, steps, mask, labels, owner, torch.tensor(types))


def right_answers(logits: torch.Tensor, batch: Packed) -> torch.Tensor:
    """Whether every token of an answer is the likeliest one, bool [questions]; greedy decoding says just these then.

    `logits` [N, V] are those of the N tokens that have a label.
    """
    labelled = batch.labels != IGNORE
    wrong = logits.argmax(-1) != batch.labels[labelled]
    return torch.zeros(len(batch.types)).index_add(0, batch.owner[labelled], wrong.float()) == 0


def accuracy(records: list[Record]) -> dict:
    """Exact match, its standard error and the number of questions.

    Questions about one picture go wrong together, so pictures, not questions, are the independent draws of the error.
    """
    mean = sum(right for *_, right in records) / len(records)
    residual = defaultdict(float)
    for number, _, right in records:
        residual[number] += right - mean
    error = sum(value**2 for value in residual.values()) ** 0.5 / len(records)
    return {"accuracy": round(mean, 4), "standard_error": round(error, 4), "n": len(records)}
