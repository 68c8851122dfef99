"""Stop signals: the first is noted, the second acts as ever."""

import os
import signal
from pathlib import Path

from srlm_mega.run.stop_signals import StopRequest, on_signals


def test_the_second_signal_acts_as_before() -> None:
    seen: list[str] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append("before"))
    try:
        with on_signals((signal.SIGUSR1,), lambda: seen.append("noted")):
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == ["noted", "before", "before"]


def test_a_signal_or_the_file_asks_to_stop(tmp_path: Path) -> None:
    file = tmp_path / "stop"
    with StopRequest.watch(file) as request:
        assert not request.made
        file.touch()
        assert request.made
    with StopRequest.watch(None) as request:
        assert not request.made
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.made
