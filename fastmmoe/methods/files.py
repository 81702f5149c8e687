"""A method's settings in a JSON file: a config's `to_dict()`, `{"type": NAME, "config": to_dict()}`, a calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastmmoe.config import ReductionConfig
from fastmmoe.methods import METHODS, FastMMoEConfig

CONFIGS = {config.__name__: config for config in METHODS}


def content_of(config: ReductionConfig) -> dict[str, Any]:
    """What `read_config_file` reads."""
    return {"type": type(config).__name__, "config": config.to_dict()}


def read_config_file(path: Path) -> tuple[ReductionConfig, str | None]:
    """A config, and the `gates_sha256` of the model that it was calibrated for.

    Without a type it is FastMMoE's. The latter is None where the file does not say of which model it is.

    Raises:
        ValueError: it cannot be read, or holds none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError(f"expected an object with settings, got a {type(values).__name__}")
        if not values:
            raise ValueError("no settings")
        if "type" in values:
            if values["type"] not in list(CONFIGS):  # it may be nothing that hashes
                raise ValueError(f"type: expected one of {', '.join(CONFIGS)}, got {values['type']!r}")
            config = CONFIGS[values["type"]].from_dict(values["config"])
        else:
            config = FastMMoEConfig.from_dict(values)
        gates = values["calibration"]["study"]["model"]["gates_sha256"] if "calibration" in values else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: holds no config: {said}") from error
    return config, gates
