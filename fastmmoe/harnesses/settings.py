"""A method and its settings, from the words that a harness's command line holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from fastmmoe.config import ReductionConfig
from fastmmoe.methods import METHODS, FastMMoEConfig

DENSE = "dense"
# as in papers, whatever the case
BY_NAME = {config.__name__.removesuffix("Config").lower(): config for config in METHODS}
DEFAULT = next(iter(BY_NAME))


def read_method(model: Any, method: str | None, settings: Mapping[str, Any]) -> ReductionConfig | None:
    """The config of a method by its name; None: the dense model.

    Args:
        model: a transformers model or its config; settings of "fastmmoe" stand in place of its preset's.
        method: "dense" or a name of `BY_NAME`; None: "fastmmoe" where there are settings, "dense" where there are none.
        settings: fields of the method's config; a string is read as JSON where it is some (`[8,16]`, `null`).

    Raises:
        TypeError, ValueError: an unknown method or field, settings for the dense model, or settings that do not fit.
    """
    name = (method or (DEFAULT if settings else DENSE)).lower()
    if name == DENSE:
        if settings:
            raise ValueError(f"{', '.join(settings)}: the dense model has no settings; give a method")
        return None
    if name not in BY_NAME:
        raise ValueError(f"method: expected one of {', '.join((DENSE, *BY_NAME))}, got {method!r}")
    kind = BY_NAME[name]
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    if unknown := [field for field in settings if field not in known]:
        raise ValueError(f"{', '.join(unknown)}: unknown, expected settings of {name}: {', '.join(known)}")
    values = {field: _value(value) for field, value in settings.items()}
    return kind.preset(model, **values) if kind is FastMMoEConfig else kind.from_dict(values)


def _value(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
