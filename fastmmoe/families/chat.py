"""One turn of a conversation: pictures and a question as a model's inputs, and the tokens that end its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastmmoe.families.family import PLACEHOLDERS
from fastmmoe.families.names import configs_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel

    from fastmmoe.families.videos import Video


def build_inputs(
    model: PreTrainedModel, processor: Any, images: Sequence[Image], prompt: str, videos: Sequence[Video] = ()
) -> dict[str, Any]:
    """The model's inputs for one user turn, through the processor's chat template: images, videos, then the prompt.

    Raises:
        ValueError: the template is broken, or does not take such a prompt.
    """
    content = [
        *({"type": "image", "image": image} for image in images),
        *({"type": "video", "video": video.frames} for video in videos),
        {"type": "text", "text": prompt},
    ]
    options = {}
    if videos:
        metadata = [video.metadata for video in videos]
        options["processor_kwargs"] = {"videos_kwargs": {"video_metadata": metadata, "do_sample_frames": False}}
    from jinja2 import TemplateError

    try:
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **options,
        )
    except TemplateError as error:
        raise ValueError(f"model: its chat template does not take this prompt: {error}") from error
    return inputs.to(model.device, model.dtype)


def end_tokens(model: PreTrainedModel, processor: Any) -> tuple[int, ...]:
    """The ids that end an answer: the generation config's, or the tokenizer's where it names none; () without both."""
    end = model.generation_config.eos_token_id
    # not every family's official checkpoints say where generation ends
    end = processor.tokenizer.eos_token_id if end is None else end
    if end is None:
        return ()
    return tuple(end) if isinstance(end, (list, tuple)) else (end,)


def placeholders_of(config: Any, processor: Any) -> tuple[str, ...]:
    """The texts that stand for pictures, videos and sounds in a model's prompts, by its config or its processor."""
    composite = configs_of(config)[0]
    ids = (getattr(composite, name, None) for name in PLACEHOLDERS)
    tokens = processor.tokenizer.convert_ids_to_tokens([n for n in ids if n is not None and n >= 0])
    own = (getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio"))
    return tuple(dict.fromkeys(text for text in (*tokens, *own) if text))


def check_question(name: str, question: str, placeholders: Sequence[str]) -> None:
    """Check that a question is text alone.

    Args:
        name: where it comes from, for the error.
        placeholders: see `placeholders_of`.

    Raises:
        ValueError: an empty one, one that UTF-8 cannot encode, or one that holds a placeholder.
    """
    if not question.strip():
        raise ValueError(f"{name}: expected a question, got {question!r}")
    try:
        question.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: expected text in UTF-8, got {question!r}") from None
    for placeholder in placeholders:
        if placeholder in question:
            raise ValueError(
                f"{name}: holds {placeholder}, which stands for a picture, video or sound in this model's prompts; "
                "expected text without it"
            )
