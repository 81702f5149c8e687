"""What a device does at best: ceilings of known GPUs from public figures, of this CPU as measured, or from a file."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch

# beyond which times of a prefill overflow, or mean nothing
_RANGES = {"flops": (1, 1e30), "bytes": (1, 1e30), "launch": (0, 1.0)}


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device in one dtype.

    Attributes:
        name: what the device is called.
        flops: operations per second of a large matrix product; a multiply-add is 2.
        bytes: bytes per second of a large copy, read plus written.
        launch: seconds that the host takes for one eager operation of PyTorch.
        dtype: of weights and activations, by torch's name.
        source: where the figures come from, in words.
    """

    name: str
    flops: float
    bytes: float
    launch: float
    dtype: str
    source: str

    def __post_init__(self) -> None:
        for field in ("name", "dtype", "source"):
            if not isinstance(getattr(self, field), str):
                raise ValueError(f"{field}: expected words, got {getattr(self, field)!r}")
        for field, (least, most) in _RANGES.items():
            value = getattr(self, field)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            # written so that nan fails too
            if not is_number or not value >= least:
                raise ValueError(f"{field}: expected a number >= {least}, got {value!r}")
            if value > most:
                raise ValueError(f"{field}: expected a number <= {most:g}, got {value!r}")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype: expected one of torch's such as bfloat16, got {self.dtype!r}")

    @property
    def itemsize(self) -> int:
        """Bytes per number."""
        return getattr(torch, self.dtype).itemsize


# an eager launch with its share of the model's Python: an assumption. Launches alone take about 5 us of the host
_LAUNCH = 8e-6
_ASSUMED = "8 us per launch assumed"

DEVICES = {
    ceilings.name: ceilings
    for ceilings in (
        Ceilings(
            "h100", 794e12, 3.0e12, _LAUNCH, "bfloat16",
            "H100 SXM: the best of a public search over shapes, 794 of the datasheet's 989 TFLOP/s; copies at 3.0 of "
            f"3.35 TB/s, as measured in public; {_ASSUMED}",
        ),
        Ceilings(
            "h200", 794e12, 4.3e12, _LAUNCH, "bfloat16",
            f"H200: the H100's TFLOP/s; 90 % of the datasheet's 4.8 TB/s assumed; {_ASSUMED}",
        ),
        Ceilings(
            "a100", 268e12, 1.83e12, _LAUNCH, "bfloat16",
            "A100 SXM 80 GB: the best of a public search over shapes, 268 of the datasheet's 312 TFLOP/s; 90 % of the "
            f"datasheet's 2.04 TB/s assumed; {_ASSUMED}",
        ),
        Ceilings(
            "l40s", 290e12, 0.78e12, _LAUNCH, "bfloat16",
            f"L40S: 80 % of the datasheet's 362 TFLOP/s and 90 % of its 0.864 TB/s assumed; {_ASSUMED}",
        ),
        Ceilings(
            "mi300x", 668e12, 4.3e12, _LAUNCH, "bfloat16",
            "MI300X: the best of a public search over shapes, 668 of the datasheet's 1,307 TFLOP/s; 81 % of its "
            f"5.3 TB/s, as measured in public; {_ASSUMED}",
        ),
    )
}  # fmt: skip
CPU = "cpu"

# by how torch's name of a card begins; other forms of a card, such as those on PCIe, have other ceilings
_CARDS = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA L40S": "l40s",
    "AMD Instinct MI300X": "mi300x",
}

# side of the square matrices and bytes of the copy
_SIZES = {"cpu": (1024, 2**26), "cuda": (8192, 2**30)}
_MATMUL_SECONDS, _COPY_SECONDS, _LAUNCH_SECONDS = 0.25, 0.15, 0.05
_LAUNCHES = 200


def ceilings_of(device: str | Path | Ceilings) -> Ceilings:
    """The ceilings of a name in `DEVICES`, of "cpu" (float32, measured once per process), or in a .json file.

    Raises:
        TypeError, ValueError: no such device, or a file that does not hold a `Ceilings`' fields, at its top or under
            "ceilings" as in what `bench/bench_prefill.py` writes.
        OSError: a file that cannot be read.
    """
    if isinstance(device, Ceilings):
        return device
    if not isinstance(device, (str, Path)):
        raise TypeError(f"device: expected a name or a .json file, got {device!r} ({type(device).__name__})")
    if str(device).endswith(".json"):
        return _read(Path(device))
    if device == CPU:
        return _measure_cpu(torch.get_num_threads())
    if device not in DEVICES:
        known = ", ".join((*DEVICES, CPU))
        raise ValueError(f"device: expected one of {known} or a .json file of ceilings, got {str(device)!r}")
    return DEVICES[device]


def known_device(device: torch.device, dtype: torch.dtype) -> str | None:
    """What `ceilings_of` calls a device that computes in `dtype`; None: it has no ceilings."""
    if device.type == "cpu":
        return CPU if dtype == torch.float32 else None
    if device.type != "cuda" or dtype.itemsize != 2:
        return None
    return card(torch.cuda.get_device_name(device))


def card(name: str) -> str | None:
    """The name in `DEVICES` of a card as torch calls it."""
    return next((known for begin, known in _CARDS.items() if name.startswith(begin)), None)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure a CPU or a CUDA device, in half a second: the best of several matrix products, copies and tiny sums."""
    side, size = _SIZES[device.type]
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    source = torch.randn(size // 4, device=device)
    target, out, one = torch.empty_like(source), torch.empty_like(a), torch.ones(1, device=device)

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def launch() -> None:
        for _ in range(_LAUNCHES):
            one.add(1.0)

    matmul = _best(lambda: torch.mm(a, b, out=out), wait, _MATMUL_SECONDS)
    copy = _best(lambda: target.copy_(source), wait, _COPY_SECONDS)
    # without waiting: what the host takes, whatever the device does meanwhile
    tiny = _best(launch, lambda: None, _LAUNCH_SECONDS) / _LAUNCHES
    wait()
    words = f"{str(dtype).removeprefix('torch.')} matmul of {side}^3 and copy of {size // 2**20} MiB"
    threads = f", {torch.get_num_threads()} thread(s)" if device.type == "cpu" else ""
    return Ceilings(
        name=device.type,
        flops=2 * side**3 / matmul,
        bytes=2 * size / copy,
        launch=tiny,
        dtype=str(dtype).removeprefix("torch."),
        source=f"measured here: {words}{threads}",
    )


@cache
def _measure_cpu(threads: int) -> Ceilings:
    return measure_ceilings(torch.device("cpu"), torch.float32)


def _best(call: Callable[[], object], wait: Callable[[], None], seconds: float) -> float:
    """The shortest time of a call, of all that fit; one more in front warms up."""
    call()
    wait()
    best, deadline = math.inf, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        call()
        wait()
        end = time.perf_counter()
        best = min(best, end - start)
        if end > deadline:
            return best


def _read(path: Path) -> Ceilings:
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"device: {path} is not JSON: {error}") from None
    if isinstance(found, dict) and isinstance(found.get("ceilings"), dict):
        found = found["ceilings"]
    names = [field.name for field in fields(Ceilings)]
    if not isinstance(found, dict) or sorted(found) != sorted(names):
        got = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"device: {path}: expected the fields {', '.join(names)}, got {got}")
    try:
        return Ceilings(**found)
    except ValueError as error:
        raise ValueError(f"device: {path}: {error}") from None
