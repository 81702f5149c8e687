"""A video as frames for a model's processor, and which of its frames those are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers.video_utils import VideoMetadata

FRAMES_PER_SECOND = 2  # where a processor does not say how many it wants


@dataclass(frozen=True, eq=False)
class Video:
    """Sampled frames, uint8 [frames, height, width, 3], and what transformers wants to know of where they come from."""

    frames: np.ndarray
    metadata: VideoMetadata


def frames_to_take(processor: Any, metadata: VideoMetadata) -> list[int]:
    """The numbers of the frames that a processor samples from a video with this number of frames and this rate."""
    sampler = processor.video_processor
    settings = {name: getattr(sampler, name, None) for name in sampler.valid_kwargs.__annotations__}
    if settings.get("fps") is None and settings.get("num_frames") is None:
        settings["fps"] = FRAMES_PER_SECOND
    return [int(number) for number in sampler.sample_frames(metadata, **settings)]
