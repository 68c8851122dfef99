"""A watchdog over stages: one that shows no progress for too long is ended, with the place where it hangs.

Ranks have a watchdog of their own, which speaks first and knows more (training/heartbeat.py). This one is the
controller's: for stages in one process, samplers and their replicas, and for ranks that never started.
"""

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil

from srlm_mega.config import Config
from srlm_mega.errors import StageCrashed
from srlm_mega.launch.child_process import SHOW_STACKS
from srlm_mega.run.plan import Stage
from srlm_mega.run.progress import ProgressState
from srlm_mega.sampling.shards import held_shards

SECONDS_TO_SHOW_STACKS = 3.0
SECONDS_BETWEEN = 0.2  # they share a log: at one moment their lines would be torn


def stall_seconds(stage: Stage, config: Config) -> float:
    """Return the seconds without progress after which a stage is ended. Ranks get twice their longest phase: their own
    watchdog comes first."""
    trainer = config.trainer
    longest_phase = max(
        trainer.start_timeout_minutes,
        trainer.step_timeout_minutes,
        trainer.checkpoint_timeout_minutes,
        trainer.export_timeout_minutes,
    )
    return 60 * (2 * longest_phase if stage.kind.parallel else config.runtime.progress_timeout_minutes)


class StallWatchdog:
    """The time for which the stage `name`, working in the folder `output`, has shown the same progress: at most
    `seconds`."""

    def __init__(self, name: str, output: Path, log_file: Path, seconds: float) -> None:
        self._name, self._output, self._log_file, self._seconds = name, output, log_file, seconds
        self._state, self._since = ProgressState(), time.monotonic()

    def check(self, state: ProgressState, pid: int) -> None:
        """Take note of the newest progress. StageCrashed when it is too old, after process `pid` and those below it
        were asked to write their stacks to the log."""
        if state != self._state:
            self._state, self._since = state, time.monotonic()
        if time.monotonic() - self._since <= self._seconds:
            return
        asked = ask_for_stacks(pid)
        where = f" at {state.done:,} of {state.total:,} {state.unit}" if state.total else ""
        holders = "; ".join(held_shards(self._output))
        raise StageCrashed(
            f"{self._name}: no progress for {self._seconds / 60:g} min{where}"
            + (f". Waited for: {holders}" if holders else "")
            + f". The stacks of {asked} processes are in {self._log_file}. To allow a longer time: "
            "runtime.progress_timeout_minutes, where ranks train trainer.*_timeout_minutes"
        )


def ask_for_stacks(pid: int) -> int:
    """Ask a process and all below it for their stacks; return how many handle the signal and were asked."""
    asked = 0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if handles_signal(process.pid):
                os.kill(process.pid, SHOW_STACKS)
                asked += 1
                time.sleep(SECONDS_BETWEEN)
    time.sleep(SECONDS_TO_SHOW_STACKS)
    return asked


def handles_signal(pid: int) -> bool:
    """Tell whether a process survives the signal that asks for stacks: it catches it or, as srun does, blocks it to
    pass it on."""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = dict(line.split(":", 1) for line in status.splitlines() if line.startswith(("SigCgt:", "SigBlk:")))
    return any(int(mask, 16) >> (SHOW_STACKS - 1) & 1 for mask in masks.values())
