"""What the distribution's extras bring, and what of it is missing here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from fastmmoe_cli.console import fail

# extra of the distribution -> the modules it brings
EXTRAS = {
    "triton": ("triton",),
    "cli": ("typer", "rich"),
    "demo": ("PIL", "matplotlib", "skimage"),
    "study": ("sklearn",),
    "vllm": ("vllm",),
    "lmms-eval": ("lmms_eval",),
}


def missing_of(modules: Iterable[str]) -> list[str]:
    """Those that are not installed."""
    return [module for module in modules if importlib.util.find_spec(module) is None]


def need(extra: str, *modules: str) -> None:
    """Refuse to go on without these modules, and name the extra that brings them."""
    if missing := missing_of(modules):
        fail(f"this needs {', '.join(missing)}: pip install 'fastmmoe[{extra}]'")
