"""Nodes call node 0 over TCP: who is there, what they report, whose clock is off. It takes no shared folder and no
torch, so it works when these do not.

A node sends its rank and gets node 0's clock and the id of this attempt; sends its report; is told whether to start
ranks; sends how these ended. Messages are JSON lines.
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


class Connection:
    """A connection that sends and receives messages. OSError when the other side is gone or too slow."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb")

    def send(self, message: Message) -> None:
        """Send a message."""
        self._connection.settimeout(5)
        self._connection.sendall(orjson.dumps(message) + b"\n")

    def receive(self, deadline: float) -> Message:
        """Wait for the next message until `deadline` (`time.monotonic()`)."""
        self._connection.settimeout(max(0.01, deadline - time.monotonic()))
        text = self._file.readline(LONGEST_LINE)
        if not text:
            raise ConnectionError("the other side ended the connection")
        message: Message = orjson.loads(text)
        return message

    def close(self) -> None:
        """Close it."""
        self._file.close()
        self._connection.close()


@dataclass(frozen=True)
class Caller:
    """A node that called, and its report."""

    rank: int
    connection: Connection
    report: Message


class RollCall:
    """Node 0's side of the calls."""

    def __init__(self, port: int, attempt: str) -> None:
        self._listener = socket.create_server(("", port), backlog=512)
        self._attempt = attempt
        self._callers: queue.Queue[Caller] = queue.Queue()

    def gather(self, others: int, seconds: float) -> list[Caller]:
        """Return the nodes that reported within `seconds`; ends early when all `others` did."""
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
            threading.Thread(target=self._greet, args=(Connection(connection), deadline), daemon=True).start()

    def _greet(self, node: Connection, deadline: float) -> None:
        """Answer at once, in a thread of its own: clocks are compared by the time of this answer."""
        try:
            rank = node.receive(deadline)["rank"]
            node.send({"attempt": self._attempt, "time": time.time()})
            self._callers.put(Caller(rank, node, node.receive(deadline)["report"]))
        except (OSError, ValueError, KeyError):  # a stranger, or a node that went away: it counts as absent
            node.close()


@dataclass(frozen=True)
class Greeting:
    """Node 0's answer: the id of the attempt, and the seconds that this node's clock is ahead, with their error."""

    attempt: str
    clock_ahead: float
    clock_error: float


def call(address: str, port: int, rank: int, seconds: float) -> tuple[Connection, Greeting]:
    """Call node 0 until it answers, from another node. OSError when it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic()))
            break
        except OSError:
            if time.monotonic() + RETRY_SECONDS > deadline:
                raise
            time.sleep(RETRY_SECONDS)
    node_0 = Connection(connection)
    sent = time.time()
    node_0.send({"rank": rank})
    answer = node_0.receive(deadline)
    received = time.time()
    return node_0, Greeting(answer["attempt"], (sent + received) / 2 - answer["time"], (received - sent) / 2)
