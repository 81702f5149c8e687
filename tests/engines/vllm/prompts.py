"""The prompts that are compared: what users send, and what a server's bookkeeping may get wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata

Size = tuple[int, int]  # of an image in pixels, width and height

TOKEN = 8  # pixels


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Noise over a coarse pattern: neighbours are alike, but not the same."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 32), -(-width // 32), 3), dtype=np.uint8)
    pixels = coarse.repeat(32, 0).repeat(32, 1)[:height, :width].astype(int)
    return Image.fromarray((pixels * 3 // 4 + rng.integers(0, 64, pixels.shape)).astype(np.uint8))


@dataclass(frozen=True)
class Clip:
    """A video of two frames a second."""

    size: Size
    frames: int

    @property
    def pixels(self) -> np.ndarray:
        """uint8 [frames, height, width, 3]."""
        return np.stack([np.asarray(picture(*self.size, seed=100 + frame)) for frame in range(self.frames)])

    @property
    def metadata(self) -> dict[str, Any]:
        frames = {"total_num_frames": self.frames, "frames_indices": list(range(self.frames))}
        return frames | {"fps": 2.0, "duration": self.frames / 2, "video_backend": "none"}


@dataclass(frozen=True)
class Case:
    """A turn of a conversation.

    Attributes:
        parts: texts, images' sizes and videos, in order.
        new_tokens: how many to generate.
        stops: whether the end of a turn ends it earlier.
    """

    parts: tuple[str | Size | Clip, ...]
    new_tokens: int = 12
    stops: bool = False

    @property
    def has_vision(self) -> bool:
        return any(not isinstance(part, str) for part in self.parts)

    @property
    def images(self) -> list[Image.Image]:
        sizes = [part for part in self.parts if isinstance(part, tuple)]
        return [picture(*size, seed=number) for number, size in enumerate(sizes)]

    @property
    def clips(self) -> list[Clip]:
        return [part for part in self.parts if isinstance(part, Clip)]

    def messages(self) -> list[dict[str, Any]]:
        kinds = {tuple: {"type": "image"}, Clip: {"type": "video"}}
        content = [kinds.get(type(part)) or {"type": "text", "text": part} for part in self.parts]
        return [{"role": "user", "content": content}]


SMALL, MIDDLE, BIG, TINY = (96, 64), (128, 96), (160, 128), (32, 16)
LONG = "The red square moves from left to right. " * 20
CASES = {
    "text": Case(("What is in this picture?",), 14),
    "one image": Case((MIDDLE, "What is in this picture?"), 20),
    "two images": Case((SMALL, "The picture shows a cat.", MIDDLE, "Describe it in one sentence."), 16),
    "adjoining images": Case((SMALL, TINY, SMALL, "What is it?"), 12),
    "short answer": Case(("Look at", SMALL, "a red square?"), 3),
    "big image": Case((BIG, "Describe the photograph in one sentence."), 30),
    "long text": Case((LONG, SMALL, "What happens?" * 4), 12),
    "long text, another question": Case((LONG, SMALL, "Describe the picture."), 12),
    "long text alone": Case((LONG + "Describe the picture.",), 12),
    "tiny image": Case(("What is this?", TINY, "And what is it not?"), 12),
    "long question": Case((MIDDLE, "Describe the picture, all that there is to see in it. " * 12), 8),
    "until the end": Case((SMALL, "Say no more."), 40, stops=True),
}

# beside these, for families that take videos
CLIPS = {
    "video": Case((Clip((64, 48), 6), "What happens in this video?"), 16),
    "image and video": Case((SMALL, "and", Clip((64, 64), 4), "What is it?"), 12),
}

# of the first one's image, the second one's is the first; the third one's are others
WAITING = {
    "one to cache": Case((SMALL, "What is it?"), 4),
    "one more": Case((SMALL, "and", MIDDLE, "Which?"), 4),
    "two others": Case((MIDDLE, "and", SMALL, "Which?"), 4),
}
ALL = CASES | CLIPS | WAITING


@dataclass
class Prompts:
    """The cases as texts of one checkpoint, as its chat template has them."""

    directory: Path
    processor: Any = field(init=False)

    def __post_init__(self) -> None:
        self.processor = AutoProcessor.from_pretrained(self.directory)

    def text(self, case: Case) -> str:
        return self.processor.apply_chat_template(case.messages(), add_generation_prompt=True, tokenize=False)

    def inputs(self, case: Case) -> dict[str, Any]:
        """What a model of transformers takes."""
        vision = {"images": case.images} if case.images else {}
        if case.clips:
            vision["videos"] = [clip.pixels for clip in case.clips]
            metadata = [VideoMetadata(**clip.metadata) for clip in case.clips]
            vision["videos_kwargs"] = {"video_metadata": metadata, "do_sample_frames": False}
        return self.processor(text=[self.text(case)], return_tensors="pt", **vision)

    def request(self, case: Case) -> dict[str, Any]:
        """What vLLM takes."""
        vision: dict[str, Any] = {"image": case.images} if case.images else {}
        if case.clips:
            vision["video"] = [(clip.pixels, clip.metadata | {"do_sample_frames": False}) for clip in case.clips]
        return {"prompt": self.text(case)} | ({"multi_modal_data": vision} if vision else {})
