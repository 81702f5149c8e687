"""Memory of a call: the most that is allocated at one time, and what is left when it returns.

On a GPU this is what PyTorch's caching allocator counts. On a CPU it is what PyTorch's profiler reports of every single
allocation and release, custom ops included: the same number each time, unlike the process's resident memory, which
depends on what the C library keeps. Not counted on a CPU: scratch space that a library (oneDNN, BLAS) takes from the
system by itself.
"""

import gc
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

# the profiler announces each start on stderr
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Memory:
    """Bytes beyond what was allocated before the call: `peak` during it, `left` after it (its result, mostly)."""

    peak: int
    left: int


def measure_memory(call: Callable[[], Result], device: torch.device) -> tuple[Memory, Result]:
    """Run `call` once. Releases of what was there before count on a GPU, not on a CPU."""
    gc.collect()
    if device.type != "cpu":
        return _measure_on_gpu(call, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    return peak_of(_changes(profiler)), result


def _measure_on_gpu(call: Callable[[], Result], device: torch.device) -> tuple[Memory, Result]:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak, left = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    return Memory(peak - before, left - before), result


def _changes(profiler: profile) -> list[tuple[int, int]]:
    """(address, bytes) of every allocation, and with negative bytes of every release, in order."""
    found, stack = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=lambda change: change[0])]


def peak_of(changes: Iterable[tuple[int, int]]) -> Memory:
    """Memory after these (address, bytes) were allocated, or released where negative."""
    sizes: dict[int, int] = {}
    total = peak = 0
    for address, size in changes:
        if size > 0:
            sizes[address] = size
            total += size
            peak = max(peak, total)
        else:
            # the profiler also reports releases of what was allocated before, with sizes it may have wrong
            total -= sizes.pop(address, 0)
    return Memory(peak, total)
