"""A process of the controller's: started, watched, and made to say why it ended."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from srlm_mega.config import Config
from srlm_mega.errors import (
    CANNOT_CONTINUE,
    PAUSED,
    STOP_REQUESTED,
    USER_ERROR,
    CannotContinue,
    StageCrashed,
    StopRequested,
    TrainingPaused,
    UserError,
)
from srlm_mega.launch.child_process import die_with, environment
from srlm_mega.launch.ranks import Start
from srlm_mega.run.progress import read_progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.replicas import terminate

LOG_TAIL_LINES = 15
PATIENCE_SECONDS = 60.0
TORCHRUN_REPORT = "torch/distributed/elastic/multiprocessing/api.py"


@dataclass(frozen=True)
class StageProcess:
    """A process and what it prints: to a log with earlier attempts in it; on the nodes of a step, to a file each."""

    process: subprocess.Popen[bytes]
    log_file: Path
    earlier_bytes: int
    nodes: Path | None

    @property
    def pid(self) -> int:
        """Its number."""
        return self.process.pid

    def poll(self) -> int | None:
        """Its exit code, None while it works."""
        return self.process.poll()

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        return self.process.wait()

    def wait_for_end(self) -> None:
        """For a process whose work is done. One that then hangs is ended with the block it was started in."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE_SECONDS)

    @property
    def log_place(self) -> Path:
        """Where a person looks."""
        return self.nodes or self.log_file

    def last_words(self) -> str:
        """The last lines, of every node."""
        texts = {self.log_file: self.log_file.read_bytes()[self.earlier_bytes :].decode(errors="replace")}
        if self.nodes is not None:
            texts |= {path: path.read_text(errors="replace") for path in sorted(self.nodes.glob("*.log"))}
        return "\n".join(
            "\n".join([f"The end of {path}:", *last_lines(text)])
            for path, text in texts.items()
            if text or path == self.log_file
        )


def last_lines(text: str) -> list[str]:
    """The end of what ranks printed. torchrun's own report, which follows, is longer and says less."""
    lines = text.splitlines()
    reports = [number for number, line in enumerate(lines) if TORCHRUN_REPORT in line]
    return lines[: reports[0] if reports else None][-LOG_TAIL_LINES:]


@contextmanager
def started(start: Start, name: str, config: Config, run: RunDir) -> Iterator[StageProcess]:
    """A process whose words go to the log of `name`; ended when the block ends.

    It is a session of its own, so that what is sent to this one, such as Ctrl-C, reaches it as the stop file only:
    torchrun would give its ranks no time for a checkpoint.
    """
    log_file = run.log_file(name)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    if start.logs is not None:
        start.logs.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as log:
        earlier_bytes = log.tell()
        process = subprocess.Popen(
            start.argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(die_with, os.getpid()),
            env=environment(os.environ, config.launch.threads_per_process, cpu=config.trainer.device == "cpu"),
        )
        try:
            yield StageProcess(process, log_file, earlier_bytes, start.logs)
        finally:
            if process.poll() is None:
                terminate([process])


def explain_failure(name: str, process: StageProcess, run: RunDir) -> None:
    """Raise what a stage or a comparison said about its end, or show the end of what it printed."""
    code = process.wait()
    said = read_progress(run.progress_file(name))
    if said.exit_code == PAUSED:
        raise TrainingPaused(said.message)
    if said.exit_code == CANNOT_CONTINUE:
        raise CannotContinue(f"{name}: {said.message}")
    if said.exit_code == USER_ERROR:
        raise UserError(f"{name}: {said.message}")
    if said.exit_code == STOP_REQUESTED:
        raise StopRequested(f"{name}: {said.message}")
    if said.message:
        raise StageCrashed(f"{name}: {said.message}. The stacks of all ranks are in {process.log_place}")
    how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
    raise StageCrashed(f"{name} ended with {how}. {process.last_words()}")
