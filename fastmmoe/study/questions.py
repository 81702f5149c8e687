"""Pictures, questions and their answers: of the package's own scenes, or from a user's file."""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastmmoe.families.images import open_image

if TYPE_CHECKING:
    from PIL.Image import Image

SCENES_PER_SEED = 1_000_000
STREAM = 2  # of a scene's random numbers: 0 draws it, 1 draws training's questions
REQUIRED, OPTIONAL = ("image", "question", "answer"), ("type",)


@dataclass(frozen=True)
class Example:
    """A question about a picture.

    Attributes:
        answer: the right one.
        type: what kind of question it is; "" if it has none.
        where: file and line that it comes from; "" if from none.
    """

    image: Image | Path
    question: str
    answer: str
    type: str = ""
    where: str = ""

    def open_image(self) -> Image:
        """The picture, RGB and upright.

        Raises:
            ValueError: a file that is no picture; names it, and the question's line.
        """
        if not isinstance(self.image, Path):
            return self.image
        try:
            return open_image(self.image)
        except ValueError as error:
            raise ValueError(f"{self.where}: image {error}") from error


def scene_questions(split: str, n: int, seed: int = 0) -> list[Example]:
    """One question about each of `n` scenes of a split, types in turn; other seeds ask about other scenes.

    One question per picture makes them independent draws, as the standard errors take them to be.
    """
    from PIL import Image

    from fastmmoe.scenes import TYPES, ask, generator, scene

    names, examples = list(TYPES), []
    for index in range(n):
        number = seed * SCENES_PER_SEED + index
        shown, rng = scene(split, number), generator(split, number, STREAM)
        # the next type where a scene has nothing to ask for; some fit every scene
        turns = (names[(index + turn) % len(names)] for turn in range(len(names)))
        asked = next(asked for name in turns if (asked := ask(shown, name, rng)) is not None)
        examples.append(Example(Image.fromarray(shown.pixels), asked.text, asked.answer, asked.type))
    return examples


def read_questions(path: str | Path, n: int | None = None) -> list[Example]:
    """The first `n` questions (None: all) of a JSONL file.

    A line is an object with `image` (a path, relative to the file), `question`, `answer`, and `type` if one is wanted.
    Empty lines do not count.

    Raises:
        ValueError: no such file, no question in it, or a line that is none; names file and line.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")  # JSON may hold what else ends a line
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()][:n]
    if not numbered:
        raise ValueError(f"{path}: holds no question, expected one JSON object per line")
    return [_example(path, number, line) for number, line in numbered]


def matches(said: str, answer: str) -> bool:
    """Whether the words said are the answer's, in its order; spaces, case and a full stop at the end do not count."""
    return _words(said) == _words(answer)


def _words(text: str) -> list[str]:
    return text.casefold().strip().removesuffix(".").split()


def _example(path: Path, number: int, line: bytes) -> Example:
    where = f"{path}, line {number}"
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: no UTF-8 ({error})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object, got {type(values).__name__}")
    if missing := [name for name in REQUIRED if name not in values]:
        raise ValueError(f"{where}: {', '.join(missing)} missing, expected {', '.join(REQUIRED)}")
    if unknown := sorted(set(values) - {*REQUIRED, *OPTIONAL}):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}, expected {', '.join(REQUIRED + OPTIONAL)}")
    for name, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: expected {name} to be a string, got {value!r}")
        if any("\ud800" <= letter <= "\udfff" for letter in value):  # JSON can write what UTF-8 cannot
            raise ValueError(f"{where}: expected {name} to be text in UTF-8, got {value!r}")
    image = path.parent / values["image"]
    if not image.is_file():
        raise ValueError(f"{where}: no image {image}")
    return Example(image, values["question"], values["answer"], values.get("type", ""), where)
