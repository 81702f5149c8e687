"""What every harness is to who compares runs: tasks on one checkpoint, under any config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastmmoe.config import ReductionConfig


@dataclass(frozen=True)
class Runs:
    """A harness's tasks on one checkpoint.

    Attributes:
        about: what its results depend on, apart from the config.
        check: refuses a config that does not fit the checkpoint, with what `fastmmoe.enable` or `flops` raise.
        run: asks all questions under a config (None: dense); gives `scores` (task -> metric -> number, None where it
            is not finite), and `costs`, per prompt ({} where the harness knows of none). It raises whatever stops it:
            no question that failed is a wrong answer.
    """

    about: dict[str, Any]
    check: Callable[[ReductionConfig | None], None]
    run: Callable[[ReductionConfig | None], dict[str, Any]]
