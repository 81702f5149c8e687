"""Time several calls side by side: round after round, each once per round in an order of its own.

What the machine does in between (clocks, heat, other work) then meets all of them. On a GPU every call starts with an
L2 that holds nothing of it, and runs as a CUDA graph unless it waits for the device, so that the times are the device's
and not the Python interpreter's.
"""

import functools
import random
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

# what Triton's own benchmark writes between runs; several times any L2
FLUSH_BYTES = 256 * 2**20


def prepare(call: Call, device: torch.device) -> tuple[Call, bool]:
    """`call`, warmed up and as a CUDA graph where that is possible, and whether it is one."""
    if device.type != "cuda":
        call()
        return call, False
    graph = _capture(call)
    if graph is None:
        return call, False
    # `call` lives as long as the graph, which keeps no reference to tensors from before the capture but reads them
    return functools.partial(_replay, graph, call), True


def _replay(graph: torch.cuda.CUDAGraph, _call: Call) -> None:
    graph.replay()


def _capture(call: Call) -> torch.cuda.CUDAGraph | None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # this context gives the current stream back even where a failed capture does not
    with torch.cuda.stream(stream):
        call()
        call()
        torch.cuda.synchronize()
        if _waits_for_device(call):
            return None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
    torch.cuda.synchronize()
    return graph


def _waits_for_device(call: Call) -> bool:
    """Asked before the capture, because one that fails leaves the process in a bad state."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return False


def interleave(calls: dict[Key, Call], rounds: int, device: torch.device, seed: int = 0) -> dict[Key, list[float]]:
    """Seconds of every call in every round, after one round that does not count."""
    run_round = _round_on_gpu if device.type == "cuda" else _round_on_cpu
    order = list(calls)
    rng = random.Random(seed)
    seconds: dict[Key, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        rng.shuffle(order)
        for name, value in run_round(calls, order).items():
            if number:
                seconds[name].append(value)
    return seconds


def take_turns(
    calls: Mapping[Key, Callable[[], Result]], rounds: int, deadline: float = float("inf"), seed: int = 0
) -> dict[Key, list[Result]]:
    """Results of calls that measure themselves, in every round; once the deadline has passed no other round begins.

    There is at least one. `deadline` is a time of `time.monotonic`.
    """
    order = list(calls)
    rng = random.Random(seed)
    results: dict[Key, list[Result]] = {name: [] for name in calls}
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            break
        rng.shuffle(order)
        for name in order:
            results[name].append(calls[name]())
    return results


def _round_on_cpu(calls: dict[Key, Call], order: list[Key]) -> dict[Key, float]:
    seconds = {}
    for name in order:
        start = time.perf_counter()
        calls[name]()
        seconds[name] = time.perf_counter() - start
    return seconds


def _round_on_gpu(calls: dict[Key, Call], order: list[Key]) -> dict[Key, float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    events = {}
    for name in order:
        events[name] = start, end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        flush.zero_()
        start.record()
        calls[name]()
        end.record()
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}
