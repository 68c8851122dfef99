"""The parts of `srlm bench device`, one after another: each a process group with a time limit, killed at it.

A part's limit is its own seconds and what earlier parts left over. What was measured is on disk whenever this process
is cut off: a part writes its result itself, and the summary is written after each part.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import orjson
import psutil

from srlm_mega.errors import StopRequested
from srlm_mega.launch.child_process import die_with
from srlm_mega.run.files import write_atomic

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Skipped:
    """Why a part cannot run here."""

    reason: str


Command = Sequence[str] | Skipped


@dataclass(frozen=True)
class DevicePart:
    """A part of the measurement; `command` is asked when its turn has come. With fewer than `least` of its `seconds`
    left it is skipped. It writes NAME.json in the folder."""

    name: str
    seconds: float
    least: float
    command: Callable[[], Command]


@dataclass(frozen=True)
class PartResult:
    """What became of a part: one with a reason in `skipped` was never started, one without an exit code was cut off at
    its limit. `result` is the file that it wrote. Times are in seconds."""

    name: str
    command: tuple[str, ...]
    limit: float
    seconds: float
    exit_code: int | None
    skipped: str | None
    result: str | None

    @property
    def failed(self) -> bool:
        """True for a part that was started and did not end well."""
        return self.skipped is None and self.exit_code != 0

    def __str__(self) -> str:
        if self.skipped is not None:
            return f"{self.name}: skipped, {self.skipped}"
        log = f", see {self.name}.log"
        ended = "cut off at its limit" if self.exit_code is None else f"exit code {self.exit_code}"
        how = f"{ended}{log}" if self.failed else "done"
        return f"{self.name}: {how}, {self.seconds:.0f} of {self.limit:.0f} s, {self.result or 'no result'}"


@dataclass(frozen=True)
class DeviceSummary:
    """`summary.json`: all parts so far, in the order in which they had their turn."""

    minutes: float
    seconds: float
    parts: tuple[PartResult, ...]


def run_parts(parts: Sequence[DevicePart], out: Path, minutes: float, settings: dict[str, str]) -> DeviceSummary:
    """Run the parts with these environment variables, print a line for each, and return what became of them.
    StopRequested after SIGTERM, which ends the part at work."""
    begin, allotted = time.monotonic(), 0.0
    more = max(1.0, 60 * minutes / sum(part.seconds for part in parts))
    summary = DeviceSummary(minutes, 0.0, ())
    with stopped_by_sigterm(out):
        for part in parts:
            allotted = min(allotted + more * part.seconds, 60 * minutes)
            limit = allotted - (time.monotonic() - begin)
            result = run_part(part, out, limit, settings)
            summary = DeviceSummary(minutes, time.monotonic() - begin, (*summary.parts, result))
            write_atomic(out / SUMMARY, orjson.dumps(asdict(summary), option=orjson.OPT_INDENT_2))
            print(result, flush=True)
    return summary


def run_part(part: DevicePart, out: Path, limit: float, settings: dict[str, str]) -> PartResult:
    """Run one part, with its log in NAME.log, and end all of its processes at the limit."""

    def result(command: Sequence[str], seconds: float, code: int | None, skipped: str | None) -> PartResult:
        file = out / f"{part.name}.json"
        name = file.name if skipped is None and file.is_file() else None
        return PartResult(part.name, tuple(command), limit, seconds, code, skipped, name)

    if limit < part.least:
        return result((), 0.0, None, f"{max(limit, 0):.0f} s are left, and it needs {part.least:.0f}")
    command = part.command()
    if isinstance(command, Skipped):
        return result((), 0.0, None, command.reason)
    begin = time.monotonic()
    die = partial(die_with, os.getpid())
    with (out / f"{part.name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=settings,
            start_new_session=True, preexec_fn=die,
        )  # fmt: skip
        try:
            process.wait(max(0.0, limit))
        except subprocess.TimeoutExpired:
            pass
        finally:
            code = process.poll()
            kill_all(process)
    return result(command, time.monotonic() - begin, code, None)


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process, its group, and what it has started in other groups, as `srlm run` does with its stages."""
    started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    with suppress(ProcessLookupError):  # all of the group have ended
        os.killpg(process.pid, signal.SIGKILL)
    for child in started:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


@contextmanager
def stopped_by_sigterm(out: Path) -> Iterator[None]:
    """Raise StopRequested in the block when SIGTERM comes."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StopRequested(f"stopped by SIGTERM: {out} has what was measured until then")

    before: Any = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except StopRequested:  # it may have come while a process was being started
        for child in psutil.Process().children(recursive=True):
            child.kill()
            child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
