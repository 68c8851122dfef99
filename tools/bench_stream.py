"""Time on a GPU's stream, apart from the host's: what every benchmark of kernels takes its samples with.

A launch costs the host 20 to 50 microseconds, more than many kernels run. On an idle stream each kernel would wait for
its launch, and the time between two events would be the host's. So the stream is given other work first, for so long
that the host has queued the whole call behind it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import Protocol

import torch

from srlm_mega.tools.bench_timing import timed

LEAD = 2.0  # so far the stream is ahead of the host, in the host's last times
MAX_FLUSHES = 256  # some 15 ms on an H200, and far fewer launches than a stream can hold


class Event(Protocol):
    """What is used of `torch.cuda.Event`."""

    def record(self) -> None:
        """Mark this place of the stream."""

    def query(self) -> bool:
        """Tell whether the device has passed the mark, without waiting."""

    def synchronize(self) -> None:
        """Wait until the device has passed the mark."""

    def elapsed_time(self, other: "Event") -> float:
        """Return the milliseconds from this mark to another."""


@dataclass(frozen=True)
class StreamSample:
    """One call: its milliseconds on the device, and those that the host took to queue it. `starved` where the device
    was done with the other work before: then its time contains some of the host's. On a CPU there is one time only."""

    milliseconds: float
    host_milliseconds: float | None = None
    starved: bool = False


def timing_event() -> Event:
    """Return an event of the current CUDA stream."""
    event: Event = torch.cuda.Event(enable_timing=True)
    return event


@dataclass
class StreamTimer:
    """Samples of one call. `flush` queues a piece of the other work, which also empties the L2 cache: what the call
    before left there must not help."""

    call: Callable[[], object]
    flush: Callable[[], object]
    make_event: Callable[[], Event] = timing_event
    clock: Callable[[], float] = time.perf_counter
    flushes: int = field(default=1, init=False)

    def sample(self) -> StreamSample:
        """Time the call once. How long the stream is kept busy follows from the sample before: warm up first."""
        before, start, stop = self.make_event(), self.make_event(), self.make_event()
        before.record()
        _, queueing = timed(lambda: [self.flush() for _ in range(self.flushes)], self.clock)
        start.record()
        _, host = timed(self.call, self.clock)
        starved = start.query()
        stop.record()
        stop.synchronize()
        lead = (before.elapsed_time(start) - queueing * 1e3) / self.flushes  # of one flush
        self.flushes = min(MAX_FLUSHES, max(1, ceil(LEAD * host * 1e3 / lead))) if lead > 0 else MAX_FLUSHES
        return StreamSample(start.elapsed_time(stop), host * 1e3, starved)
