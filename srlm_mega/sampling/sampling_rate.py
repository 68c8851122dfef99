"""Sampling speed of a stage: metrics.jsonl, with a line per shard and one for all, and progress with the time left.

A shard's seconds are from its first request to its last answer; an engine works on several at once, so the rates of
one say less than those of the stage. The percentiles matter because a stage waits for its slowest shards at the end.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from typing import Protocol

import orjson

from srlm_mega.sampling.finished_shard import ShardReport
from srlm_mega.text import duration

ProgressCallback = Callable[[int, int, str], None]
"""Function that is given the requests answered so far, their total, and a note of a few words."""


def unreported(done: int, total: int, note: str) -> None:
    """Show no progress."""


class Watch(Protocol):
    """Hears of the answers and shards of a process as they come."""

    def answered(self) -> None:
        """Count a request that has its result."""

    def finished(self, report: ShardReport) -> None:
        """Count a shard that is finished."""


class Unwatched:
    """A `Watch` that counts nothing: a replica's, whose shards are counted by their files."""

    def answered(self) -> None:
        """Do nothing."""

    def finished(self, report: ShardReport) -> None:
        """Do nothing."""


class ShardWatch:
    """Turns answers and the reports of finished shards into metrics and progress. `metrics_file`: None for none;
    `total`: requests of the stage; `devices`: GPUs of one replica; `on_progress` gets requests done, total, and a note
    with the time left."""

    def __init__(
        self, metrics_file: Path | None, on_progress: ProgressCallback, total: int, devices: int, replicas: int
    ) -> None:
        self._file = metrics_file
        self._on_progress = on_progress
        self._total = total
        self._devices = devices
        self._replicas = replicas
        self._begin = time.monotonic()
        self._reports: list[ShardReport] = []
        self._done = self._before = 0  # of whole shards; and those of earlier attempts
        self._within = 0  # answers of unfinished shards
        self._note = ""
        on_progress(0, total, "")

    def earlier(self, report: ShardReport) -> None:
        """Count a shard of an earlier attempt, which took none of this attempt's time."""
        self._done += report.requests
        self._before += report.requests
        self._on_progress(self._done, self._total, "")

    def answered(self) -> None:
        """Count a request of an unfinished shard."""
        self._within += 1
        self._on_progress(self._done + self._within, self._total, self._note)

    def finished(self, report: ShardReport) -> None:
        """Count a shard that was finished just now, write its line and report the time left."""
        self._reports.append(report)
        self._done += report.requests
        self._within = max(0, self._within - report.requests)
        self._write(shard_metrics(report, self._devices))
        seconds = time.monotonic() - self._begin
        left = duration((self._total - self._done) / ((self._done - self._before) / seconds))
        tokens_per_second = sum(report.output_tokens for report in self._reports) / seconds
        self._note = f"{left} left, {tokens_per_second:,.0f} tokens/s"
        self._on_progress(self._done + self._within, self._total, self._note)

    def close(self) -> None:
        """Write the line for all shards of this attempt."""
        if self._reports:
            seconds = time.monotonic() - self._begin
            self._write(stage_metrics(self._reports, seconds, self._devices * self._replicas))

    def _write(self, metrics: dict[str, float]) -> None:
        if self._file is None:
            return
        with self._file.open("ab") as file:
            file.write(orjson.dumps(metrics, option=orjson.OPT_APPEND_NEWLINE))


def shard_metrics(report: ShardReport, devices: int) -> dict[str, float]:
    """Return a shard's line. Rates per GPU divide by `devices`, the GPUs of its replica (1 for a CPU process)."""
    seconds = max(report.seconds, 1e-3)  # reports are in milliseconds
    return {
        "shard": report.shard,
        "replica": report.replica,
        "requests": report.requests,
        "failed": report.failed,
        "queue_seconds": report.queue_seconds,
        "seconds": report.seconds,
        "requests/s": report.requests / seconds,
        "prompt_tokens/s/GPU": report.prompt_tokens / seconds / devices,
        "output_tokens/s/GPU": report.output_tokens / seconds / devices,
    }


def stage_metrics(reports: list[ShardReport], seconds: float, devices: int) -> dict[str, float]:
    """Return the line for all shards: rates over `seconds` of wall-clock time, loading of the model included."""
    times = [report.seconds for report in reports]
    percentiles = quantiles(times, n=100, method="inclusive") if len(times) > 1 else times * 99
    return {
        "shards": len(reports),
        "requests": sum(report.requests for report in reports),
        "failed": sum(report.failed for report in reports),
        "seconds": seconds,
        "requests/s": sum(report.requests for report in reports) / seconds,
        "prompt_tokens/s/GPU": sum(report.prompt_tokens for report in reports) / seconds / devices,
        "output_tokens/s/GPU": sum(report.output_tokens for report in reports) / seconds / devices,
        "shard_seconds_p50": percentiles[49],
        "shard_seconds_p95": percentiles[94],
        "shard_seconds_p99": percentiles[98],
        "shard_seconds_max": max(times),
    }
