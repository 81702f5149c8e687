"""Figures that the machine code of every GEMM had when they were last accepted, one file per Triton version.

ptxas comes with Triton, so that the version determines the figures: a change of the kernels alone can change them. The
files are in the checkout, not in the wheel.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "aot_baseline"
# of instructions and registers
TOLERANCE = 0.02
# figure -> what it counts, whether less is better, relative growth that is tolerated
FIGURES = {
    "instructions": ("instructions per step of the main loop", True, TOLERANCE),
    "registers": ("registers", True, TOLERANCE),
    "shared_bytes": ("bytes of shared memory", True, 0.0),
    "wgmma": ("wgmma", False, 0.0),
    "wgmma_in_flight": ("groups of wgmma in flight", False, 0.0),
}


def baseline_path(version: str) -> Path:
    """The file of a Triton version such as "3.7.1"; patch releases share one."""
    return FOLDER / f"triton-{'.'.join(version.split('.')[:2])}.json"


def read_baseline(version: str) -> dict[str, dict[str, float]] | None:
    """Configuration -> its figures; None for a version without a file.

    Raises:
        ValueError: a file that holds something else.
    """
    path = baseline_path(version)
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}; write it anew with --write-baseline") from None
    configurations = found.get("configurations") if isinstance(found, dict) else None
    if not isinstance(configurations, dict):
        raise ValueError(f"{path}: expected an object of configurations; write it anew with --write-baseline")
    return configurations


def write_baseline(version: str, configurations: dict[str, dict[str, float]]) -> Path:
    """One line per configuration, sorted."""
    lines = [f"{json.dumps(key)}: {json.dumps(figures)}" for key, figures in sorted(configurations.items())]
    text = ",\n".join(lines)
    path = baseline_path(version)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'{{"triton": {json.dumps(version)}, "configurations": {{\n{text}\n}}}}\n', encoding="utf-8")
    return path


def compare(accepted: dict[str, float], figures: dict[str, float]) -> tuple[list[str], list[str]]:
    """What is worse than accepted and what is better, each as "112 -> 131 registers (+17 %)"."""
    worse, better = [], []
    for name, (what, less_is_better, tolerance) in FIGURES.items():
        before, after = accepted.get(name, 0), figures.get(name, 0)
        if abs(after - before) > tolerance * before:
            change = f" ({(after - before) / before:+.0%})".replace("%", " %") if before else ""
            is_worse = (after > before) == less_is_better
            (worse if is_worse else better).append(f"{before:g} -> {after:g} {what}{change}")
    return worse, better
