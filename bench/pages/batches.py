"""Training batches: pages, and many questions about each in one packed sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from quality.scoring import Packed, pack_questions

from pages.layout import BAR, Page
from pages.model import MERGE, PATCH, TOKEN
from pages.questions import TYPES, Question, ask, types_of
from pages.words import COLUMNS, ROWS, VOCABULARY, token_ids

EOS, PAD = VOCABULARY["<eos>"], VOCABULARY["<pad>"]
NAMES = list(TYPES)


@dataclass(frozen=True)
class Batch(Packed):
    """Questions about pages: `positions` [3, B, L] are M-RoPE's: time, height, width."""

    positions: torch.Tensor


def draw_questions(page: Page, rng: np.random.Generator, weights: np.ndarray, count: int) -> list[Question]:
    """Up to `count` different questions, types by weight; a poor page has fewer."""
    names = types_of(page.kind)
    chances = np.array([weights[NAMES.index(name)] for name in names])
    found: dict[str, Question] = {}
    for number in rng.choice(len(names), 2 * count, p=chances / chances.sum()):
        question = ask(page, names[number], rng)
        if question is not None and len(found) < count:
            found.setdefault(question.text, question)
    return list(found.values())


def image_positions(side: int) -> torch.Tensor:
    """M-RoPE's positions of `<vision>`, side x side vision tokens and `</vision>`, [3, side * side + 2]."""
    place = torch.arange(side)
    rows, columns = place.repeat_interleave(side), place.repeat(side)
    inner = 1 + torch.stack((torch.zeros_like(rows), rows, columns))
    return torch.cat((torch.zeros(3, 1, dtype=torch.int64), inner, torch.full((3, 1), 1 + side)), 1)


def pack(asked: list[list[Question]], side: int) -> Batch:
    """Questions about pages of side x side vision tokens as one batch."""
    image = [VOCABULARY["<vision>"], *[VOCABULARY["<image>"]] * side**2, VOCABULARY["</vision>"]]
    packed = pack_questions(
        image,
        [
            [
                (list(token_ids(question.text)), list(token_ids(question.answer)), NAMES.index(question.type))
                for question in questions
            ]
            for questions in asked
        ],
        EOS,
        PAD,
    )
    # words go on behind the last of the page's rows and columns, and its end
    positions = (side + 2 + packed.steps).expand(3, -1, -1).clone()
    positions[:, :, : len(image)] = image_positions(side)[:, None]
    return Batch(**vars(packed), positions=positions)


def cell_labels(pages: list[Page], side: int) -> torch.Tensor:
    """What every vision token shows, int64 [B, side * side, 3]: the tokens of its text, -1 where there are fewer."""
    labels = torch.full((len(pages), side * side, 3), -1)
    for number, page in enumerate(pages):
        for (row, column), text in page.cells.items():
            ids = (VOCABULARY["bars"],) if text == BAR else token_ids(text)
            labels[number, row * side + column, : len(ids)] = torch.tensor(ids)
    return labels


def ideal_features(labels: torch.Tensor, table: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vision tokens that say by the words' own embeddings what they show, and, one layer deeper, where they stand.

    By minus the embeddings, that is: a word that looks for what is most unlike itself finds the cell that shows it.
    A third token's embedding is rolled by one feature, or 512 would look like 521. An empty cell shows `<unk>`: the
    norms would blow a feature that is nearly zero up to the size of all others.

    Args:
        labels: of `cell_labels`, [B, side * side, 3].
        table: the words' embeddings, [V, H].

    Returns:
        Features [B, side * side, H]: minus the sum over a text's tokens. DeepStack features of the same shape: minus
        the sum of a row's and a column's name.
    """
    padded = torch.cat((table, table.new_zeros(1, table.shape[1])))
    shown = padded[labels]  # [B, side * side, 3, H]; -1: the row of zeros
    features = shown[:, :, :2].sum(2) + shown[:, :, 2].roll(1, -1)
    features = torch.where(labels[..., :1] < 0, table[VOCABULARY["<unk>"]], features)
    rows, columns = (
        table[torch.tensor([VOCABULARY[name] for name in names[:side]])] for names in (ROWS, COLUMNS)
    )
    places = (rows[:, None] + columns[None]).flatten(0, 1)
    return -features, -places.expand_as(features)


def patches(pictures: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the processor makes of pictures of one size: patches [P, 1536] in -1..1, and the grids, [B, 3]."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    side = pixels.shape[2] // TOKEN
    # [B, 3, row, row in token, y, column, column in token, x] -> the patches of a vision token beside each other
    pixels = pixels.view(len(pictures), 3, side, MERGE, PATCH, side, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    frames = pixels.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)  # a picture is two equal frames
    grid = torch.tensor([[1, side * MERGE, side * MERGE]]).expand(len(pictures), -1)
    return frames.flatten(0, 4).flatten(1), grid
