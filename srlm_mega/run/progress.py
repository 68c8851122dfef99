"""A stage's progress file: how far it is, or why it failed. The stage writes it, and watchers poll it."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import orjson
from pydantic import Field

from srlm_mega.run.files import write_atomic
from srlm_mega.run.logs import read_state

WRITE_INTERVAL_SECONDS = 0.2
Count = Annotated[int, Field(ge=0, le=2**53)]


@dataclass(frozen=True)
class ProgressState:
    """Progress of a stage: `done` of `total` units. `exit_code` and `message` explain a failure."""

    done: Count = 0
    total: Count = 0
    unit: str = ""
    note: str = ""
    exit_code: int | None = None
    message: str = ""


class Progress:
    """Writer of a progress file, at most five times a second."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next_write = 0.0
        path.parent.mkdir(parents=True, exist_ok=True)

    def update(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Write that `done` of `total` units are done; `note` is a few words such as the current loss."""
        now = time.monotonic()
        if now >= self._next_write or done == total:
            self._next_write = now + WRITE_INTERVAL_SECONDS
            self._write(ProgressState(done, total, unit, note))

    def failed(self, exit_code: int, message: str) -> None:
        """Write that the stage ends with this exit code and explanation."""
        self._write(ProgressState(exit_code=exit_code, message=message))

    def _write(self, state: ProgressState) -> None:
        write_atomic(self._path, orjson.dumps(state))


def read_progress(path: Path) -> ProgressState:
    """Return the newest state; an empty one when the stage has not written any yet, or it is damaged."""
    return read_state(path, ProgressState) or ProgressState()
