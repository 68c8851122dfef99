"""The report after every stage, by a process of its own: the run does not wait for it, and its end changes nothing."""

import os
import subprocess
import time
from functools import partial

from srlm_mega.launch.child_process import die_with, srlm_command
from srlm_mega.run.run_dir import RunDir

INTERVAL_SECONDS = 60.0


class BackgroundReport:
    """A process that writes RUN/report.html again, at the lowest priority, never two at once and not more often than
    every `interval_seconds`. Its output is in RUN/logs/report.log."""

    def __init__(self, run: RunDir, interval_seconds: float = INTERVAL_SECONDS) -> None:
        self._run, self._interval = run, interval_seconds
        self._next = time.monotonic() + interval_seconds  # a run that is over by then writes its report at its end
        self._process: subprocess.Popen[bytes] | None = None

    def refresh(self) -> None:
        """Start to write the page again, if it is time."""
        busy = self._process is not None and self._process.poll() is None
        if busy or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._interval
        log_file = self._run.log_file("report")
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("wb") as log:
            self._process = subprocess.Popen(
                ["nice", "-n", "19", *srlm_command(), "report", str(self._run.root)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(die_with, os.getpid()),
            )

    def close(self) -> None:
        """End the process that writes a page: the run's end writes the last report, or is in a hurry."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
