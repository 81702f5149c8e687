"""One turn of a conversation: pictures and a question as a model's inputs, and the tokens that end its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel

    from fastmmoe.families.videos import Video


def build_inputs(
    model: PreTrainedModel, processor: Any, images: Sequence[Image], prompt: str, videos: Sequence[Video] = ()
) -> dict:
    """The model's inputs for one user turn, through the processor's chat template: images, videos, then the prompt."""
    content = [
        *({"type": "image", "image": image} for image in images),
        *({"type": "video", "video": video.frames} for video in videos),
        {"type": "text", "text": prompt},
    ]
    options = {}
    if videos:
        metadata = [video.metadata for video in videos]
        options["processor_kwargs"] = {"videos_kwargs": {"video_metadata": metadata, "do_sample_frames": False}}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )
    return inputs.to(model.device, model.dtype)


def end_tokens(model: PreTrainedModel, processor: Any) -> tuple[int, ...]:
    """The ids that end an answer: the generation config's, or the tokenizer's where it names none; () without both."""
    end = model.generation_config.eos_token_id
    # not every family's official checkpoints say where generation ends
    end = processor.tokenizer.eos_token_id if end is None else end
    if end is None:
        return ()
    return tuple(end) if isinstance(end, (list, tuple)) else (end,)
