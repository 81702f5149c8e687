"""Where and with what a figure was measured; stands at the head of every JSON file, which is written here too."""

import json
import platform
import shlex
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

DISTRIBUTIONS = ("torch", "triton", "transformers", "liger-kernel")


def provenance(device: torch.device) -> dict:
    """Date, machine, versions and command line."""
    import fastmmoe  # brings transformers, which worker processes need not load

    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        machine["gpu"] = gpu.name
        machine["compute_capability"] = f"{gpu.major}.{gpu.minor}"
        machine["gpu_memory_gib"] = round(gpu.total_memory / 2**30)
        machine["cuda"] = torch.version.cuda or torch.version.hip
    return {
        "date": date.today().isoformat(),
        "machine": machine,
        "versions": {"fastmmoe": fastmmoe.__version__} | {n: v for n in DISTRIBUTIONS if (v := _version(n))},
        # another machine's folders say nothing
        "command": shlex.join(Path(word).name if Path(word).is_absolute() else word for word in sys.argv),
    }


def write_json(result: dict, path: Path | None) -> None:
    """Nothing where no file is wanted."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
