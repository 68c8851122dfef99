"""Kills, stops and pauses of a running `srlm run` at random moments, and what is left of its processes."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum, auto
from pathlib import Path

import psutil

MARK = "SRLM_SURVIVAL_TRIAL"  # every process of a trial inherits it
PATIENCE = 300.0  # seconds for what takes a few on an idle machine
POLL_SECONDS = 0.02
AFTER_A_START = 2.0  # seconds from a process's start to the kill, at most
IN_A_STAGE = 1.0  # the same from a stage's first file


class Way(StrEnum):
    """How a run is interrupted: by kill -9 of some of its processes, or by a signal to the controller."""

    KILL_ALL = auto()
    KILL_CONTROLLER = auto()
    KILL_STAGE = auto()
    KILL_TORCHRUN = auto()
    KILL_REPLICA = auto()
    KILL_REPORT = auto()
    TERM = auto()
    CTRL_C = auto()
    PAUSE = auto()
    FAILED_CALL = auto()
    FULL_DISK = auto()


ARGUMENTS = {  # by which the processes of a way are known
    Way.KILL_STAGE: "stage",
    Way.KILL_TORCHRUN: "torchrun",
    Way.KILL_REPLICA: "replica",
    Way.KILL_REPORT: "report",
}


@dataclass(frozen=True)
class Interruption:
    """What was done, and to how many processes."""

    way: Way
    processes: int


def trial_processes(mark: str) -> list[psutil.Process]:
    """The living processes of a trial, whoever is their parent. One that has ended and was not waited for has no
    environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError, psutil.NoSuchProcess):
                if wanted in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                    found.append(psutil.Process(int(name)))
    return found


def orphans(mark: str) -> list[list[str]]:
    """The command lines of what lives on although the run has ended; it is killed."""
    deadline = time.monotonic() + PATIENCE
    while (alive := trial_processes(mark)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    said = []
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            said.append(process.cmdline())
            process.kill()
    return said


def wait_for(so: Callable[[], bool], process: "subprocess.Popen[bytes]", what: str) -> None:
    """Until it is so, or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not so():
        assert time.monotonic() < deadline, f"no {what} in {PATIENCE:g} s"
        time.sleep(POLL_SECONDS)


def wait_for_moment(process: "subprocess.Popen[bytes]", mark: str, folders: Sequence[Path], rng: random.Random) -> None:
    """Until a moment drawn at random: 0 to 2 s after the start of one of the run's processes, or up to 1 s after one of
    these outputs is begun."""
    if rng.random() < 0.5:
        wanted, seen = rng.choice([1, 2, 3, 4]), set[int]()

        def started() -> bool:
            seen.update(one.pid for one in trial_processes(mark))
            return len(seen) >= wanted

        wait_for(started, process, f"process number {wanted}")
        delay = rng.uniform(0, AFTER_A_START)
    else:
        output = rng.choice(folders)
        partial = output.with_name(f"{output.name}.partial")
        wait_for(lambda: partial.exists() or output.exists(), process, str(partial))
        delay = rng.uniform(0, IN_A_STAGE)
    with suppress(subprocess.TimeoutExpired):
        process.wait(delay)


def interrupt(process: "subprocess.Popen[bytes]", mark: str, rng: random.Random) -> Interruption | None:
    """Interrupt the run in one of the ways that are possible now, drawn at random. None: it has ended already."""
    by_way: dict[Way, list[psutil.Process]] = {way: [] for way in ARGUMENTS}
    alive = trial_processes(mark)
    for one in alive:
        with suppress(psutil.NoSuchProcess):
            words = {Path(word).name for word in one.cmdline()}
            for way, argument in ARGUMENTS.items():
                if argument in words and not (way is Way.KILL_STAGE and "torchrun" in words):
                    by_way[way].append(one)
    controller = [one for one in alive if one.pid == process.pid]
    by_way |= dict.fromkeys((Way.KILL_CONTROLLER, Way.TERM, Way.CTRL_C), controller)
    by_way |= {Way.KILL_ALL: rng.sample(alive, len(alive)), Way.PAUSE: rng.sample(alive, min(1, len(alive)))}
    if not controller or process.poll() is not None:
        return None
    way = rng.choice([way for way, targets in by_way.items() if targets])
    targets = by_way[way] if way in (Way.KILL_ALL, Way.PAUSE) else rng.sample(by_way[way], 1)
    for target in targets:
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            match way:
                case Way.TERM:
                    target.send_signal(signal.SIGTERM)
                case Way.CTRL_C:
                    os.killpg(target.pid, signal.SIGINT)  # as a terminal sends it
                case Way.PAUSE:
                    target.send_signal(signal.SIGSTOP)
                    time.sleep(rng.uniform(0, 0.5))
                    target.send_signal(signal.SIGCONT)
                case _:
                    target.send_signal(signal.SIGKILL)
    return Interruption(way, len(targets))
