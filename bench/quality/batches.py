"""Training batches: pictures, and many questions about each in one packed sequence."""

from dataclasses import dataclass

import numpy as np
import torch

from fastmmoe.scenes import TYPES, Question, Scene, ask, generator, scene
from fastmmoe.scenes.pictures import CELLS, COLOURS
from fastmmoe.scenes.tokenizer import VISION_TOKENS, VOCABULARY
from quality.scoring import Packed, pack_questions

IMAGE = [VOCABULARY["<img>"], *[VOCABULARY["<IMG_CONTEXT>"]] * VISION_TOKENS, VOCABULARY["</img>"]]
PREFIX = len(IMAGE)
EOS, PAD = VOCABULARY["<eos>"], VOCABULARY["<pad>"]
SIDE = round(VISION_TOKENS**0.5)


@dataclass(frozen=True)
class Batch(Packed):
    """Questions about scenes: `pixels` [B, 3, 100, 100] in -1..1, `positions` [B, L]."""

    pixels: torch.Tensor
    positions: torch.Tensor


def to_pixels(scenes: list[Scene]) -> torch.Tensor:
    """What the processor makes of pictures: float32 [B, 3, 100, 100] in -1..1."""
    pixels = torch.from_numpy(np.stack([one.pixels for one in scenes]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_questions(scene: Scene, rng: np.random.Generator, weights: np.ndarray, count: int) -> list[Question]:
    """Up to `count` different questions, types by weight; a poor scene has fewer."""
    names = list(TYPES)
    found: dict[str, Question] = {}
    for number in rng.choice(len(names), 3 * count, p=weights / weights.sum()):
        question = ask(scene, names[number], rng)
        if question is not None and len(found) < count:
            found.setdefault(question.text, question)
    return list(found.values())


def pack(scenes: list[Scene], asked: list[list[Question]]) -> Batch:
    """Pictures and the questions asked about each as one batch."""
    packed = pack_questions(
        IMAGE,
        [
            [
                (_ids(question.text), _ids(question.answer), list(TYPES).index(question.type))
                for question in questions
            ]
            for questions in asked
        ],
        EOS,
        PAD,
    )
    positions = torch.where(packed.owner >= 0, PREFIX + packed.steps, 0)
    positions[:, :PREFIX] = torch.arange(PREFIX)
    return Batch(**vars(packed), pixels=to_pixels(scenes), positions=positions)


def _ids(text: str) -> list[int]:
    return [VOCABULARY[word] for word in text.split()]


def training_batch(
    first: int, size: int, digits: tuple[int, int], weights: np.ndarray, questions_per_picture: int
) -> Batch:
    """Training scenes `first` to `first + size - 1` and questions about them."""
    numbers = range(first, first + size)
    scenes = [scene("train", number, digits) for number in numbers]
    asked = [
        draw_questions(one, generator("train", number, 1), weights, questions_per_picture)
        for one, number in zip(scenes, numbers, strict=True)
    ]
    return pack(scenes, asked)


def token_labels(scenes: list[Scene]) -> torch.Tensor:
    """What every vision token shows, int64 [B, 100, 4]: content, colour, row and column.

    Contents are the ten digits, 10 for a shape and 11 for nothing; the colour of nothing is 6.
    """
    labels = torch.empty(len(scenes), VISION_TOKENS, 4, dtype=torch.int64)
    labels[..., 0], labels[..., 1] = 11, len(COLOURS)
    cell = torch.arange(VISION_TOKENS)
    labels[..., 2] = cell // SIDE * CELLS // SIDE
    labels[..., 3] = cell % SIDE * CELLS // SIDE
    for number, one in enumerate(scenes):
        for glyph in one.glyphs:
            labels[number, glyph.token, 0] = 10 if glyph.digit is None else glyph.digit
            labels[number, glyph.token, 1] = list(COLOURS).index(glyph.colour)
    return labels
