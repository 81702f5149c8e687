"""Which versions of what FastMMoE stands on were tested."""

import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

# oldest and newest minor version: constraints-oldest.txt, constraints-newest.txt
TESTED = {"torch": ("2.11", "2.15"), "transformers": ("5.17", "5.24"), "triton": ("3.6", "3.9")}


def installed(distribution: str) -> str | None:
    """The version that is installed; None: it is not."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def is_tested(distribution: str) -> bool:
    """Whether what is installed lies in the tested range, or is not there at all."""
    here = installed(distribution)
    oldest, newest = map(Version, TESTED[distribution])
    return here is None or oldest.release <= Version(here).release[:2] <= newest.release


def tested_range(distribution: str) -> str:
    """In words."""
    return "{} to {}".format(*TESTED[distribution])


@cache
def warn_of_untested() -> None:
    """Warn, once per process, of versions outside of the tested range, and say what that is."""
    odd = [name for name in TESTED if not is_tested(name)]
    if odd:
        what = ", ".join(f"{name} {installed(name)} (tested: {tested_range(name)})" for name in odd)
        warnings.warn(f"fastmmoe: not tested with {what}", stacklevel=4)
