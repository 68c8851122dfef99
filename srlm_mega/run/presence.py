"""The controller's own file, RUN/logs/controller.json, for `srlm status`: `srlm run` works here, or how it ended."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from srlm_mega.errors import reason
from srlm_mega.run.files import write_atomic
from srlm_mega.run.logs import read_state
from srlm_mega.run.run_dir import RunDir


@dataclass(frozen=True)
class Controller:
    """One `srlm run`. `ended` is empty while it works, and says in words how it ended."""

    pid: int
    host: str
    ended: str = ""

    @property
    def works(self) -> bool:
        """True while it works. One that was killed on another machine cannot be told from one that works."""
        return not self.ended and (self.host != socket.gethostname() or Path(f"/proc/{self.pid}").exists())


@contextmanager
def announced(run: RunDir) -> Iterator[None]:
    """Tell watchers that the controller works during the block, and how the block ended."""
    path = controller_file(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    working = Controller(os.getpid(), socket.gethostname())
    write_atomic(path, orjson.dumps(working))
    ended = "finished"
    try:
        yield
    except BaseException as error:
        ended = (reason(error) if isinstance(error, Exception) else "") or type(error).__name__
        raise
    finally:
        with suppress(OSError):  # it would hide why the block ended, such as a full disk
            write_atomic(path, orjson.dumps(replace(working, ended=ended)))


def read_controller(run: RunDir) -> Controller | None:
    """Return the newest controller, None where none has worked yet."""
    path = controller_file(run)
    if not path.exists():
        return None
    damaged = Controller(0, "", f"{path} cannot be read, so it is not known whether `srlm run` works")
    return read_state(path, Controller) or damaged


def controller_file(run: RunDir) -> Path:
    """Return the path of the controller's file, next to the stages' progress files."""
    return run.root / "logs" / "controller.json"
