"""`srlm bench compare`: two records row by row, as ratios with their spread.

A ratio is that of the medians; its interval is the middle 95 % of what resampling both rows' samples gives. Samples of
one process are not independent, and two processes meet different machines: an interval that holds 1 shows no
difference, one that does not may still be the machine's. What one `srlm bench` interleaves itself is worth more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from srlm_mega.config.knobs import flat
from srlm_mega.errors import UserError
from srlm_mega.tools.bench_record import BenchRecord, BenchRow, read_record, spread

RESAMPLES = 2000
FEWEST_SAMPLES = 3  # below, no interval


@dataclass(frozen=True)
class Ratio:
    """B by A of one row. `low` and `high` are None where there are too few samples. `verdict` in words."""

    name: str
    a: BenchRow
    b: BenchRow
    value: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """Whether B is better, as far as the samples can tell."""
        if self.low is None or self.high is None:
            return "one sample" if len(self.a.samples) == len(self.b.samples) == 1 else "few samples"
        if self.low <= 1 <= self.high:
            return "no difference shown"
        if self.a.better == "neither":
            return "differs"
        return "better" if (self.value < 1) == (self.a.better == "lower") else "worse"


def compare(first: Path, second: Path, other_device: bool, other_command: bool) -> str:
    """The table of B against A. UserError where they are of different benchmarks, or of different devices or commands
    unless that is asked for."""
    a, b = read_record(first), read_record(second)
    check_comparable(a, b, other_device, other_command)
    return as_text(a, b, ratios(a, b))


def check_comparable(a: BenchRecord, b: BenchRecord, other_device: bool, other_command: bool) -> None:
    """The same thing on the same kind of machine, or what differs was asked for."""
    if a.bench != b.bench:
        raise UserError(f"A is of the benchmark {a.bench}, B of {b.bench}: nothing in them can be compared")
    if (a.device, a.devices) != (b.device, b.devices) and not other_device:
        raise UserError(
            f"A ran on {a.devices} x {a.device}, B on {b.devices} x {b.device}. If that is what to compare: "
            "--other-device"
        )
    if a.command != b.command and not other_command:
        raise UserError(
            f"A is of `{' '.join(a.command)}`, B of `{' '.join(b.command)}`. If that is what to compare: "
            "--other-command"
        )


def ratios(a: BenchRecord, b: BenchRecord) -> list[Ratio]:
    """Rows that both have, with samples and the same unit, in A's order."""
    others = {row.name: row for row in b.rows}
    found = []
    for row in a.rows:
        other = others.get(row.name)
        if other is not None and row.samples and other.samples and row.unit == other.unit and row.median:
            found.append(ratio(row, other))
    return found


def ratio(a: BenchRow, b: BenchRow) -> Ratio:
    """B by A, with the interval of the resampled ratio."""
    assert a.median and b.median is not None, f"{a.name}: a ratio to nothing"
    value = b.median / a.median
    if min(len(a.samples), len(b.samples)) < FEWEST_SAMPLES:
        return Ratio(a.name, a, b, value, None, None)
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(np.array(row.samples), (RESAMPLES, len(row.samples))), axis=1) for row in (a, b)]
    low, high = np.quantile(medians[1] / medians[0], [0.025, 0.975]).tolist()
    return Ratio(a.name, a, b, value, low, high)


def as_text(a: BenchRecord, b: BenchRecord, found: list[Ratio]) -> str:
    """What differs between the two, and a Markdown table."""
    lines = [f"B against A: benchmark {a.bench}", f"A: {about(a)}", f"B: {about(b)}"]
    lines += differences("version of", a.versions, b.versions)
    lines += differences("setting", flat(a.settings), flat(b.settings))
    lines += ["", "| what | unit | A | B | B / A | |", "|---|---|---|---|---|---|"]
    for one in found:
        interval = "" if one.low is None else f" [{one.low:.3g}, {one.high:.3g}]"
        cells = (one.name, one.a.unit, spread(one.a), spread(one.b), f"{one.value:.3g}{interval}", one.verdict)
        lines.append(f"| {' | '.join(cells)} |")
    alone = {row.name for row in a.rows} ^ {row.name for row in b.rows}
    return "\n".join([*lines, *(f"only in one of them: {name}" for name in sorted(alone))])


def differences(what: str, a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    """A line for each key whose values differ."""
    return [
        f"another {what} {key}: {a.get(key)}, {b.get(key)}"
        for key in dict.fromkeys([*a, *b])
        if a.get(key) != b.get(key)
    ]


def about(record: BenchRecord) -> str:
    """One line."""
    return (
        f"{record.date}, {record.devices} x {record.device}, commit {(record.commit or 'unknown')[:12]}, "
        f"load {record.load_average[0]:.1f}: {' '.join(record.command)}"
    )
