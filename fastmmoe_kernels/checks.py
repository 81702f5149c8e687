"""Refuse bad input before any work: every error names the argument, what was expected and what came."""

import math
from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Check type, shape, dtype and device of a tensor argument.

    An int in `shape` must match exactly; a string only names a free dimension in the error.

    Raises:
        TypeError: not a tensor, or a dtype that is not in `dtypes`.
        ValueError: another shape, or another device than `device`.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    fits = value.dim() == len(shape)
    # a loop: a generator would take a microsecond longer
    for want, have in zip(shape, value.shape, strict=False):
        fits = fits and (isinstance(want, str) or have == want)
    if not fits:
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, shape))}], got {list(value.shape)}")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected dtype {wanted}, got {str(value.dtype).removeprefix('torch.')}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def check_unit_stride(name: str, value: torch.Tensor) -> None:
    """Check that neighbours in one of the last two dimensions are neighbours in memory."""
    if value.stride(-1) != 1 and value.stride(-2) != 1:
        raise ValueError(f"{name}: expected stride 1 in one of the last two dimensions, got strides {value.stride()}")


def check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Check that `value` is an int in `low..high` (no upper end without `high`); bools are refused."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        expected = f">= {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name}: expected an int {expected}, got {value}")


def check_float(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    """Check that `value` is a finite number in [low, high], or (low, high] with `low_open`; bools are refused."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < low or value > high or (low_open and value == low):
        raise ValueError(f"{name}: expected a number in {'(' if low_open else '['}{low}, {high}], got {value}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
