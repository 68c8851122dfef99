"""Nodes call node 0 over TCP: who is there, what they found, whose clock is off. It takes no shared folder and no
torch, so it works when these do not.

A node says who it is and gets node 0's clock and the number of this attempt; sends its report; hears whether the ranks
are to be started; sends how that went. Messages are JSON lines.
"""

import queue
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

RETRY_SECONDS = 0.2
LONGEST_LINE = 1 << 20
Message = Mapping[str, Any]


class Line:
    """One connection. OSError when the other side is gone or too slow."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb")

    def tell(self, message: Message) -> None:
        """Send."""
        self._connection.settimeout(5)
        self._connection.sendall(orjson.dumps(message) + b"\n")

    def hear(self, deadline: float) -> Message:
        """The next message, until a `time.monotonic()`."""
        self._connection.settimeout(max(0.01, deadline - time.monotonic()))
        text = self._file.readline(LONGEST_LINE)
        if not text:
            raise ConnectionError("the other side ended the connection")
        message: Message = orjson.loads(text)
        return message

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._connection.close()


@dataclass(frozen=True)
class Caller:
    """A node that called, and its report."""

    rank: int
    line: Line
    report: Message


class RollCall:
    """Node 0's side."""

    def __init__(self, port: int, attempt: str) -> None:
        self._listener = socket.create_server(("", port), backlog=512)
        self._attempt = attempt
        self._callers: queue.Queue[Caller] = queue.Queue()

    def gather(self, others: int, seconds: float) -> list[Caller]:
        """The nodes that reported within `seconds`; ends early when all `others` did."""
        deadline = time.monotonic() + seconds
        threading.Thread(target=self._accept, args=(deadline,), daemon=True).start()
        callers: dict[int, Caller] = {}
        while len(callers) < others and (left := deadline - time.monotonic()) > 0:
            try:
                caller = self._callers.get(timeout=left)
            except queue.Empty:
                break
            callers[caller.rank] = caller
        self._listener.close()
        return [callers[rank] for rank in sorted(callers)]

    def _accept(self, deadline: float) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed: everybody is there, or it is too late
                return
            threading.Thread(target=self._greet, args=(Line(connection), deadline), daemon=True).start()

    def _greet(self, line: Line, deadline: float) -> None:
        """At once, in a thread of its own: the answer's time is what clocks are compared by."""
        try:
            rank = line.hear(deadline)["rank"]
            line.tell({"attempt": self._attempt, "time": time.time()})
            self._callers.put(Caller(rank, line, line.hear(deadline)["report"]))
        except (OSError, ValueError, KeyError):  # a stranger, or a node that went away: it counts as absent
            line.close()


@dataclass(frozen=True)
class Greeting:
    """What a node learns first: the number of the attempt, and how far its clock is ahead of node 0's, in seconds,
    give or take the error."""

    attempt: str
    clock_ahead: float
    clock_error: float


def call(address: str, port: int, rank: int, seconds: float) -> tuple[Line, Greeting]:
    """Another node's side: call until node 0 answers. OSError when it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic()))
            break
        except OSError:
            if time.monotonic() + RETRY_SECONDS > deadline:
                raise
            time.sleep(RETRY_SECONDS)
    line = Line(connection)
    sent = time.time()
    line.tell({"rank": rank})
    answer = line.hear(deadline)
    heard = time.time()
    return line, Greeting(answer["attempt"], (sent + heard) / 2 - answer["time"], (heard - sent) / 2)
