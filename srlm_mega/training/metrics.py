"""What a training stage says while it runs: one JSON line per optimiser step, a bar or a log line for people."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import orjson
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LOG_INTERVAL_SECONDS = 10.0
Report = Callable[[int, int, str, str], None]  # done, total, unit, a few words


@dataclass
class MetricsLog:
    """Writes metrics.jsonl and reports progress; only the main rank has one that does anything."""

    file: IO[bytes]
    num_steps: int
    reports: tuple[Report, ...]

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One optimiser step."""
        self.file.write(orjson.dumps({"step": step, **metrics}, option=orjson.OPT_APPEND_NEWLINE))
        note = f"loss {metrics['loss']:.4f}"
        for report in self.reports:
            report(step, self.num_steps, "steps", note)


@contextmanager
def metrics_log(path: Path, num_steps: int, report: Report | None) -> Iterator[MetricsLog]:
    """A log of `num_steps` steps; `report`, if any, hears of every step as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as file, _for_people() as shown:
        yield MetricsLog(file, num_steps, (shown,) if report is None else (shown, report))


@contextmanager
def _for_people() -> Iterator[Report]:
    """A progress bar on a terminal, a line every ten seconds elsewhere."""
    if not sys.stdout.isatty():
        yield every(LOG_INTERVAL_SECONDS, _print_line)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns) as bar:
        task = bar.add_task("training")
        yield lambda done, total, unit, note: bar.update(task, completed=done, total=total, description=note)


def every(seconds: float, report: Report) -> Report:
    """`report`, but not more often than this, and always for the last step."""
    last = time.monotonic()

    def limited(done: int, total: int, unit: str, note: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= seconds:
            last = time.monotonic()
            report(done, total, unit, note)

    return limited


def _print_line(done: int, total: int, unit: str, note: str) -> None:
    print(f"{done}/{total} {unit}, {note}", flush=True)
