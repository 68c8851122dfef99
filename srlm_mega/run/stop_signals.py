"""Requests to stop: a signal, or a file named `stop` in the run folder."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)  # sent by schedulers before they take a machine away


@contextmanager
def on_signals(numbers: tuple[signal.Signals, ...], react: Callable[[], None]) -> Iterator[None]:
    """Call `react` when one of the signals arrives in the block; a second one acts as it did before the block."""
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        react()

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


@dataclass
class StopRequest:
    """A request to stop, as one rank sees it: a scheduler's signal, or a file that a person or `srlm run` makes. Ranks
    agree on it among themselves."""

    file: Path | None
    signalled: bool = False

    @classmethod
    @contextmanager
    def watch(cls, file: Path | None) -> Iterator["StopRequest"]:
        """Yield a request that signals set during the block."""
        request = cls(file)

        def note() -> None:
            request.signalled = True

        with on_signals(PREEMPTION, note):
            yield request

    @property
    def made(self) -> bool:
        """True once this process was asked to stop."""
        return self.signalled or (self.file is not None and self.file.exists())
