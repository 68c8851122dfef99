"""Nodes call node 0 over TCP: who is there, what they report, whose clock is off. It takes no shared folder and no
torch, so it works when these do not.

A node sends its rank and the job's token, and gets node 0's clock and the id of this attempt; sends its report; is told
whether to start ranks; sends how these ended. Messages are JSON lines. Whatever else comes is refused in one line.
"""

import hashlib
import hmac
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from pydantic import TypeAdapter

from srlm_mega.config.file import find_file
from srlm_mega.errors import UserError
from srlm_mega.launch.preflight.node_report import NodeReport

TOKEN = "SRLM_JOB_TOKEN"  # random; the job script makes it
RETRY_SECONDS = 0.2
ANSWER_SECONDS = 3.0  # of a port before the next one is tried: node 0 answers at once
LONGEST_LINE, LONGEST_CALL = 1 << 20, 1 << 10
STRANGERS, STRANGER_SECONDS = 256, 5.0  # connections without a token at once, and how long each may stay
MOST_LINES, LONGEST_REASON = 50, 200
NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
Message = Mapping[str, Any]


def job_token(arguments: Sequence[str]) -> str:
    """Return the word by which the nodes of a job know one another: the job's own, or one that follows from its number
    and configuration (file and overrides)."""
    if given := os.environ.get(TOKEN):
        return given
    known = [os.environ.get("SLURM_JOB_ID", ""), *arguments[1:]]
    content = find_file(Path(arguments[0])).read_bytes()
    return hashlib.sha256(orjson.dumps(known) + content).hexdigest()


class Connection:
    """A connection that sends and receives messages. OSError when the other side is gone or too slow, or sends anything
    but messages."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""

    def send(self, message: Message) -> None:
        """Send a message."""
        self._connection.settimeout(5)
        self._connection.sendall(orjson.dumps(message) + b"\n")

    def receive(self, deadline: float, longest: int = LONGEST_LINE) -> Message:
        """Wait for the next message, of at most `longest` bytes, until `deadline` (`time.monotonic()`)."""
        parts = [self._received]
        while b"\n" not in parts[-1]:
            if sum(map(len, parts)) > longest:
                raise ConnectionError(f"it sent a line of more than {longest} bytes")
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError("it sent no whole line in time")
            self._connection.settimeout(left)
            parts.append(self._connection.recv(1 << 16))
            if not parts[-1]:
                raise ConnectionError("the other side ended the connection")
        line, _, self._received = b"".join(parts).partition(b"\n")
        try:
            message = orjson.loads(line)
        except orjson.JSONDecodeError:
            raise ConnectionError("what it sent is not JSON") from None
        if not isinstance(message, dict):
            raise ConnectionError("what it sent is not a JSON object")
        return message

    def close(self) -> None:
        """Close it."""
        self._connection.close()


@dataclass(frozen=True)
class Caller:
    """A node that called, and its report."""

    rank: int
    connection: Connection
    report: NodeReport


class RollCall:
    """Node 0's side of the calls, which `listener` takes. Only nodes with the job's token are heard."""

    def __init__(self, listener: socket.socket, attempt: str, token: str) -> None:
        self._listener, self._attempt, self._token = listener, attempt, token
        self._callers: queue.Queue[Caller | None] = queue.Queue()
        self._strangers = threading.BoundedSemaphore(STRANGERS)
        self._over = threading.Event()
        self._said: set[str] = set()

    def gather(self, others: int, seconds: float) -> list[Caller]:
        """Return the nodes that reported within `seconds`; ends early when all `others` did."""
        deadline = time.monotonic() + seconds
        threading.Thread(target=self._accept, args=(others, deadline), daemon=True).start()
        callers: dict[int, Caller] = {}
        while len(callers) < others and (left := deadline - time.monotonic()) > 0:
            try:
                caller = self._callers.get(timeout=left)
            except queue.Empty:
                break
            if caller is None:
                break
            if caller.rank in callers:
                callers[caller.rank].connection.close()
            callers[caller.rank] = caller
        self.close()
        return [callers[rank] for rank in sorted(callers)]

    def close(self) -> None:
        """Take no more calls; a `gather` of another thread ends."""
        self._over.set()
        self._callers.put(None)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # `close` alone does not wake who waits in `accept`
        self._listener.close()

    def _accept(self, others: int, deadline: float) -> None:
        while not self._over.is_set():
            self._strangers.acquire()
            try:
                connection, (address, *_) = self._listener.accept()
                arguments = (Connection(connection), address, others, deadline)
                threading.Thread(target=self._hear, args=arguments, daemon=True).start()
            except (OSError, RuntimeError):  # closed: it is over; or there are too many open files or threads
                self._strangers.release()
                self._over.wait(RETRY_SECONDS)

    def _hear(self, node: Connection, address: str, others: int, deadline: float) -> None:
        """Take one call, in a thread of its own. A stranger, or a node that went away, counts as absent."""
        try:
            rank = self._greet(node, others, deadline)
            report = report_of(rank, node.receive(deadline))
            self._callers.put(Caller(rank, node, report))
        except OSError as error:
            why = str(error)[:LONGEST_REASON]
            with suppress(OSError):
                node.send({"refused": why})
            node.close()
            line = f"preflight: a call from {address} does not count: {why}"
            if line not in self._said and len(self._said) < MOST_LINES and not self._over.is_set():
                self._said.add(line)
                print(line, flush=True)

    def _greet(self, node: Connection, others: int, deadline: float) -> int:
        """Answer at once, since clocks are compared by the time of this answer; return the caller's rank."""
        try:
            said = node.receive(min(deadline, time.monotonic() + STRANGER_SECONDS), LONGEST_CALL)
            if not hmac.compare_digest(
                str(said.get("token")).encode(errors="replace"), self._token.encode(errors="replace")
            ):
                raise ConnectionError(
                    f"it has not this job's token: give all nodes the same configuration, or the same {TOKEN}"
                )
            match said.get("rank"):
                case int(rank) if 1 <= rank <= others:
                    node.send({"attempt": self._attempt, "time": time.time()})
                    return rank
                case _:
                    raise ConnectionError(f"its rank is not one of 1 to {others}")
        finally:
            self._strangers.release()


def report_of(rank: int, message: Message) -> NodeReport:
    """Return the report of the node with this rank. ConnectionError for what is none."""
    try:
        report = TypeAdapter(NodeReport).validate_python(message.get("report"))
    except ValueError:
        report = None
    if report is None or report.rank != rank or not NODE_NAME.fullmatch(report.node):
        raise ConnectionError("it sent no report of this version of srlm-mega")
    return report


@dataclass(frozen=True)
class Greeting:
    """Node 0's answer: the id of the attempt, and the seconds that this node's clock is ahead, with their error."""

    attempt: str
    clock_ahead: float
    clock_error: float


def call(address: str, ports: Sequence[int], rank: int, token: str, seconds: float) -> tuple[Connection, Greeting]:
    """Call node 0 until it answers at one of its ports, from another node. At the others may be whoever had them first,
    such as node 0 of another job. OSError when it does not within `seconds`, UserError when it refuses this node."""
    deadline = time.monotonic() + seconds
    while True:
        failed: OSError | UserError | None = None
        for port in ports:
            limit = min(deadline, time.monotonic() + ANSWER_SECONDS) if len(ports) > 1 else deadline
            try:
                connection = socket.create_connection((address, port), timeout=max(0.1, limit - time.monotonic()))
            except OSError as error:
                failed = failed or error
                continue
            try:
                return greeted(Connection(connection), f"{address}:{port}", rank, token, limit)
            except (OSError, UserError) as error:
                connection.close()
                if len(ports) == 1:
                    raise
                failed = error
        if time.monotonic() + RETRY_SECONDS > deadline and failed is not None:
            raise failed
        time.sleep(RETRY_SECONDS)


def greeted(node_0: Connection, place: str, rank: int, token: str, deadline: float) -> tuple[Connection, Greeting]:
    """Say who calls, and return the connection with node 0's answer. OSError when there is none until `deadline`
    (`time.monotonic()`), or one of somebody else; UserError when it is a refusal."""
    sent = time.time()
    node_0.send({"rank": rank, "token": token})
    match node_0.receive(deadline):
        case {"attempt": str(attempt), "time": float(clock)}:
            received = time.time()
            return node_0, Greeting(attempt, (sent + received) / 2 - clock, (received - sent) / 2)
        case {"refused": str(why)}:
            raise UserError(f"node 0 at {place} refused the call of node {rank}: {why[:LONGEST_REASON]}")
        case _:
            raise ConnectionError("what answers there is not node 0")
