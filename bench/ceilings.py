"""What a device does at best: the rates that every share of a ceiling in the benchmarks is a share of."""

import statistics

import torch
from roofline import Ceilings
from timing import interleave, prepare

# what the ops are given to compute with
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
# side of the square matrices and bytes of the copy that show the device's ceilings
CEILING_SIZES = {"cuda": (8192, 2**30), "cpu": (1024, 2**27)}


def measure_ceilings(device: torch.device, dtype: torch.dtype, rounds: int) -> Ceilings:
    """Rates of a large matrix product and of a copy, on random numbers: zeros are faster."""
    side, size = CEILING_SIZES[device.type]
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    calls = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    prepared = {name: prepare(call, device)[0] for name, call in calls.items()}
    seconds = {name: statistics.median(s) for name, s in interleave(prepared, rounds, device).items()}
    label = f"measured, {str(dtype).removeprefix('torch.')} matmul of {side}^3 and copy of {size // 2**20} MiB"
    return Ceilings(2 * side**3 / seconds["matmul"], 2 * size / seconds["copy"], label)
