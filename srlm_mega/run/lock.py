"""The lock of a run folder: one controller, or one stage that a person started, at a time; and who that is."""

import fcntl
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from uuid import uuid4

import orjson
from pydantic import TypeAdapter

from srlm_mega.errors import UserError, naming

TOKEN = "SRLM_RUN_LOCK"  # the holder's token in the environment of the processes that it starts
LONGEST_COMMAND = 200


@dataclass(frozen=True)
class LockHolder:
    """A process that holds a run's lock. `token` is random and new for each: the processes that it starts have it."""

    token: str
    command: str
    pid: int
    host: str
    since: str

    @classmethod
    def here(cls) -> "LockHolder":
        """Return this process as a holder."""
        command = shlex.join(["srlm", *sys.argv[1:]])[:LONGEST_COMMAND]
        return cls(uuid4().hex, command, os.getpid(), socket.gethostname(), f"{datetime.now():%F %T}")

    def __str__(self) -> str:
        return f"`{self.command}`, process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def held(path: Path, or_by_starter: bool) -> Iterator[None]:
    """Hold the lock file until the block or this process ends, and give this process's children its token. UserError,
    with who it is, if another process holds it; but not, with `or_by_starter`, if that one started this one."""
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        other = holder_in(path)
        started_by_it = or_by_starter and other is not None and other.token == os.environ.get(TOKEN)
        # Some file systems do not show a lock on other nodes. On its own, a holder whose lock is free has ended.
        if started_by_it and not (free and other is not None and other.host == socket.gethostname()):
            yield
            return
        if not free:
            where = path.parent if other is None else f"{path.parent} ({other})"
            raise UserError(
                f"another srlm run or stage works in {where}: wait for it to end, or end it, then start again"
            )
        own = LockHolder.here()
        with naming(path):
            file.truncate(0)
            file.write(orjson.dumps(asdict(own)))
            file.flush()
            os.fsync(file.fileno())  # for processes on other nodes that read it over NFS
        os.environ[TOKEN] = own.token
        try:
            yield
        finally:
            os.environ.pop(TOKEN, None)
            file.truncate(0)


def holder_in(path: Path) -> LockHolder | None:
    """Return the process that wrote the file last, which need not live; None where nothing can be read."""
    try:
        return TypeAdapter(LockHolder).validate_json(path.read_bytes())
    except ValueError:
        return None
