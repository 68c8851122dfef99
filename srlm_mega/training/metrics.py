"""Metrics of a training stage while it runs: a JSON line per optimizer step, trackers, and reports of progress."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import orjson

from srlm_mega.config import Config
from srlm_mega.run.files import write_atomic
from srlm_mega.training.replay import REPLAY_LOSS
from srlm_mega.training.tracker import Tracker, open_trackers

LOG_INTERVAL_SECONDS = 10.0
Report = Callable[[int, int, str, str], None]  # done, total, unit, note


@dataclass
class MetricsLog:
    """The writer of metrics.jsonl. It reports every step and prints a line every ten seconds; the main rank has it."""

    file: IO[bytes]
    trackers: Sequence[Tracker]
    num_steps: int
    report: Report | None
    next_line: float

    def write(self, step: int, metrics: Mapping[str, float], skipped: Sequence[str] = ()) -> None:
        """Write one optimizer step; `skipped` are its items' ids if it was skipped. NaN and inf are null in JSON."""
        line = {"step": step, **metrics} | ({"skipped": skipped} if skipped else {})
        self.file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        for tracker in self.trackers:
            tracker.write(step, metrics)
        note = f"loss {metrics['loss' if 'loss' in metrics else REPLAY_LOSS]:.4f}"
        if self.report is not None:
            self.report(step, self.num_steps, "steps", note)
        if step == self.num_steps or time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + LOG_INTERVAL_SECONDS
            print(f"{step}/{self.num_steps} steps, {note}", flush=True)


@contextmanager
def metrics_log(
    config: Config, out: Path, num_steps: int, report: Report | None, done: int = 0
) -> Iterator[MetricsLog]:
    """Open the log of a stage that builds `out` in `num_steps` steps; its first `done` lines stay. Lines are written
    unbuffered: a killed stage leaves what it had."""
    path = out / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    keep_lines(path, done)
    with open_trackers(config, out, done + 1) as trackers, path.open("ab", buffering=0) as file:
        yield MetricsLog(file, trackers, num_steps, report, next_line=0.0)


def keep_lines(path: Path, number: int) -> None:
    """Cut a file back to its first `number` lines: a killed attempt was ahead of its last checkpoint."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    write_atomic(path, b"".join(lines[:number]))
