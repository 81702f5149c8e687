"""What all baselines share: the expert reduction of FastMMoE, which combines with any way of pruning."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastmmoe.config import ReductionConfig


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(ReductionConfig):
    """Base of the baselines' configs. As in `FastMMoEConfig`, every value is checked on construction.

    Args:
        vision_top_k: experts per vision token (method section 1); None leaves the model's own K.
        reduction_layer: first layer that uses `vision_top_k`; layers count from 0.
        backend: "auto" (Triton on a GPU, else torch), "triton" or "torch".
        min_vision_tokens: a prefill with fewer vision tokens than this, over its whole batch, runs the stock model.
    """

    vision_top_k: int | None = None
    reduction_layer: int = 2
    backend: str = "auto"
    min_vision_tokens: int = 0


def checked(default: Any, check: Callable[[str, Any], Any]) -> Any:
    """A dataclass field with its check, (name, value) -> the value as it is stored."""
    return field(default=default, metadata={"check": check})
