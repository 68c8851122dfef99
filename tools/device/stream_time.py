"""Milliseconds of calls on a GPU's stream, or by the clock on a CPU; the GPU's name without loading the trainer."""

from collections.abc import Callable
from itertools import pairwise

import torch

from srlm_mega.tools.bench_timing import timed

WARMUP = 2


def stream_milliseconds(call: Callable[[], object], device: torch.device, repetitions: int) -> list[float]:
    """Return the milliseconds of each call between two events, after two to warm up. All calls are queued before the
    first one is waited for, so that the GPU does not wait for the host."""
    for _ in range(WARMUP):
        call()
    if device.type != "cuda":
        return [1e3 * timed(call)[1] for _ in range(repetitions)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return [float(start.elapsed_time(stop)) for start, stop in pairwise(events)]


def gpu_name(device: torch.device) -> str | None:
    """Return a GPU's name as its driver gives it, None for a CPU."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def wall_milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds of one call by the clock, until the GPU is done with it."""

    def whole() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * timed(whole)[1]
