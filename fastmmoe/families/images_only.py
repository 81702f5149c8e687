"""A processor without its video part, for a machine without torchvision, which alone can prepare videos."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin

VIDEO_PART = "video_processor"


class _ImagesOnly(ProcessorMixin):
    """Stands between a processor's class and its base, so that the class hands its parts to this one.

    Parts go by name: a class that lists its video part in front of others cannot be called without it by position.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        parts = dict(zip(super().get_attributes(), args, strict=False)) | kwargs
        parts.pop(VIDEO_PART, None)
        super().__init__(**parts)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != VIDEO_PART]

    @classmethod
    def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        parts = dict(zip(cls.get_attributes(), args, strict=True))
        return super().from_args_and_dict([], processor_dict, **parts, **kwargs)


def images_only(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The class for text and images alone; it keeps its name, which a saved processor carries."""
    return type(processor_class.__name__, (processor_class, _ImagesOnly), {"__module__": processor_class.__module__})
