"""The host's time stays out of the GPU's, on a stream whose time is simulated."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest

from srlm_mega.tools.bench_stream import LEAD, MAX_FLUSHES, StreamSample, StreamTimer

LAUNCH, KERNEL, FLUSH = 0.03, 0.005, 0.06  # milliseconds: the host's per launch, the device's per kernel and flush


class Stream:
    """Kernels run in order, each when it is launched and the one before is done."""

    def __init__(self) -> None:
        self.host = self.done = 0.0  # milliseconds

    def launch(self, milliseconds: float) -> None:
        """Queue a kernel of so many milliseconds."""
        self.host += LAUNCH
        self.done = max(self.host, self.done) + milliseconds

    def wait(self) -> None:
        """Let the host wait for the device."""
        self.host = max(self.host, self.done)


@dataclass
class Mark:
    """An event of the stream."""

    stream: Stream
    at: float = 0.0

    def record(self) -> None:
        """Passed when all before it is done."""
        self.at = max(self.stream.host, self.stream.done)

    def query(self) -> bool:
        """Whether that was before the host's now."""
        return self.at <= self.stream.host

    def synchronize(self) -> None:
        """The host waits for it."""
        self.stream.host = max(self.stream.host, self.at)

    def elapsed_time(self, other: "Mark") -> float:
        """Milliseconds between two."""
        return other.at - self.at


def timer(call: Callable[[Stream], object]) -> StreamTimer:
    stream = Stream()
    return StreamTimer(
        partial(call, stream), partial(stream.launch, FLUSH), partial(Mark, stream), lambda: stream.host / 1e3
    )


def ten_kernels(stream: Stream) -> None:
    for _ in range(10):
        stream.launch(KERNEL)


def test_the_host_is_hidden_once_its_time_is_known() -> None:
    """Ten kernels of 5 us take 50 us on the device, and 300 us of the host; the first sample has but one flush."""
    found = timer(ten_kernels)
    first, second = found.sample(), found.sample()
    assert first.starved and first.milliseconds == pytest.approx(10 * LAUNCH - FLUSH + KERNEL), "the host's time"
    assert second == StreamSample(pytest.approx(10 * KERNEL), pytest.approx(10 * LAUNCH), starved=False)
    assert found.flushes * (FLUSH - LAUNCH) > (LEAD - 1) * 10 * LAUNCH


def test_a_call_that_waits_for_the_gpu_is_marked() -> None:
    def waits(stream: Stream) -> None:
        ten_kernels(stream)
        stream.wait()
        ten_kernels(stream)

    found = timer(waits)
    assert [found.sample().starved for _ in range(4)] == [True] * 4


def test_a_call_that_compiles_does_not_keep_the_stream_busy_for_long() -> None:
    def compiles(stream: Stream) -> None:
        stream.host += 30_000
        ten_kernels(stream)

    found = timer(compiles)
    found.sample()
    assert found.flushes == MAX_FLUSHES
