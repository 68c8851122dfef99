"""A stage's progress file: how far it is, or why it failed. Written by the stage, polled by whoever watches."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from srlm_mega.run.files import write_atomic

WRITE_INTERVAL_SECONDS = 0.2


@dataclass(frozen=True)
class ProgressState:
    """`exit_code` and `message` are set when the stage failed in a way it can explain."""

    done: int = 0
    total: int = 0
    unit: str = ""
    note: str = ""
    exit_code: int | None = None
    message: str = ""


class Progress:
    """Writes the state at most five times a second."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next_write = 0.0
        path.parent.mkdir(parents=True, exist_ok=True)

    def update(self, done: int, total: int, unit: str, note: str = "") -> None:
        """`done` of `total` units; `note` is a few words such as the current loss."""
        now = time.monotonic()
        if now >= self._next_write or done == total:
            self._next_write = now + WRITE_INTERVAL_SECONDS
            self._write(ProgressState(done, total, unit, note))

    def failed(self, exit_code: int, message: str) -> None:
        """The stage ends with this code and this explanation."""
        self._write(ProgressState(exit_code=exit_code, message=message))

    def _write(self, state: ProgressState) -> None:
        write_atomic(self._path, orjson.dumps(asdict(state)))


def read_progress(path: Path) -> ProgressState:
    """The newest state; an empty one when the stage has not said anything yet."""
    if not path.is_file():
        return ProgressState()
    return ProgressState(**orjson.loads(path.read_bytes()))
