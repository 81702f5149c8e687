"""Pictures with known contents, questions about them, and a small trained model that answers those.

`CHECKPOINT` is the model in Hugging Face format, trained by `bench/quality/train.py`; its processor is read by
`fastmmoe.families.processors.load_processor`. `EXAMPLE` holds a picture of the test split, `picture.png`, and in
`questions.json` what may be asked about it: a list of objects with `type`, `text` and `answer`.
"""

from pathlib import Path

from fastmmoe.scenes.pictures import SPLITS, Glyph, Scene, generator, scene
from fastmmoe.scenes.questions import TYPES, Question, ask, exact_match, questions

CHECKPOINT = Path(__file__).parent / "checkpoint"
EXAMPLE = Path(__file__).parent / "example"

__all__ = [
    "CHECKPOINT", "EXAMPLE", "SPLITS", "TYPES", "Glyph", "Question", "Scene", "ask", "exact_match", "generator",
    "questions", "scene",
]  # fmt: skip
