"""Write pages as pictures, and questions about them as `fastmmoe analyze --data` and `fastmmoe calibrate` read them.

    python bench/pages/write.py --out /tmp/pages/test --split test --n 2000
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from PIL import Image
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))

from pages.layout import generator, page
from pages.questions import Question, ask, types_of
from pages.render import render
from pages.words import KINDS, Split

STREAM = 2  # of a page's random numbers: 0 lays it out, 1 draws training's questions, 3 its looks
PAGES_PER_SEED = 1_000_000


def question_about(split: Split, number: int, turn: int) -> Question:
    """One question about a page, of its kind's types in turn; the next type where the page has nothing to ask for."""
    one, rng = page(split, number), generator(split, number, STREAM)
    types = types_of(one.kind)
    turns = (types[(turn + step) % len(types)] for step in range(len(types)))
    return next(question for name in turns if (question := ask(one, name, rng)) is not None)


def main(
    out: Annotated[Path, typer.Option(help="Directory for `questions.jsonl` and the pictures.")],
    split: Annotated[Literal["train", "dev", "test"], typer.Option(help="Of words and fonts.")] = "test",
    n: Annotated[int, typer.Option(min=1, help="Pages, with one question each.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Other pages for other seeds.")] = 0,
) -> None:
    """One question about each of n pages: independent draws, as standard errors take them to be."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "questions.jsonl").open("w") as file:
        for index in tqdm(range(n), unit="page"):
            number = seed * PAGES_PER_SEED + index
            asked = question_about(split, number, index // len(KINDS))
            name = f"{index:05}.png"
            Image.fromarray(render(page(split, number), split, number)).save(out / name)
            line = {"image": name, "question": asked.text, "answer": asked.answer, "type": asked.type}
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    typer.run(main)
