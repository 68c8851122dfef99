"""A GPU's name without loading the trainer, and the time of one call until the GPU is done with it."""

from collections.abc import Callable

import torch

from srlm_mega.tools.bench_timing import timed


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
