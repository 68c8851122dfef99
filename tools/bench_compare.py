"""`srlm bench compare`: two records row by row, as ratios with their spread.

A ratio is that of the medians; its interval is the middle 95 % of the ratios that resampling both rows' samples gives.
Samples of one process are not independent, and the machine is busier in one run than in the other: an interval that
holds 1 shows no difference, one that does not may still be the machine's. Figures that one `srlm bench` interleaves
itself are worth more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from srlm_mega.config.knobs import flat
from srlm_mega.errors import UserError
from srlm_mega.tools.bench_record import BenchRecord, BenchRow, markdown, read_record, spread

RESAMPLES = 2000
FEWEST_SAMPLES = 3  # below, no interval


@dataclass(frozen=True)
class Ratio:
    """B / A of one row, with an interval; `low` and `high` are None where there are too few samples."""

    name: str
    a: BenchRow
    b: BenchRow
    value: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """In words: whether B is better, as far as the samples can tell."""
        if self.low is None or self.high is None:
            return "one sample" if len(self.a.samples) == len(self.b.samples) == 1 else "few samples"
        if self.low <= 1 <= self.high:
            return "no difference shown"
        if self.a.better == "neither":
            return "differs"
        return "better" if (self.value < 1) == (self.a.better == "lower") else "worse"


def compare(first: Path, second: Path, other_device: bool, other_command: bool) -> str:
    """Return the table of B against A. UserError where they are of different benchmarks, or of different devices or
    commands unless that is asked for."""
    a, b = read_record(first), read_record(second)
    check_comparable(a, b, other_device, other_command)
    return as_text(a, b, ratios(a, b))


def check_comparable(a: BenchRecord, b: BenchRecord, other_device: bool, other_command: bool) -> None:
    """UserError unless both measured the same thing on the same kind of machine, or the difference was asked for."""
    if a.bench != b.bench:
        raise UserError(f"A is of the benchmark {a.bench}, B of {b.bench}: nothing in them can be compared")
    if (a.device, a.devices) != (b.device, b.devices) and not other_device:
        devices = f"A ran on {a.devices} x {a.device}, B on {b.devices} x {b.device}"
        raise UserError(f"{devices}: to compare them nevertheless, add --other-device")
    if a.command != b.command and not other_command:
        commands = f"A is of `{' '.join(a.command)}`, B of `{' '.join(b.command)}`"
        raise UserError(f"{commands}: to compare them nevertheless, add --other-command")


def ratios(a: BenchRecord, b: BenchRecord) -> list[Ratio]:
    """Compare the rows that both have, with samples and in the same unit, in A's order."""
    others = {(row.name, row.unit): row for row in b.rows if row.samples}
    pairs = ((row, others.get((row.name, row.unit))) for row in a.rows if row.samples and row.median)
    return [ratio(row, other) for row, other in pairs if other is not None]


def ratio(a: BenchRow, b: BenchRow) -> Ratio:
    """Return B / A with the interval of the resampled ratio."""
    assert a.median and b.median is not None, f"{a.name}: a ratio to nothing"
    value = b.median / a.median
    if min(len(a.samples), len(b.samples)) < FEWEST_SAMPLES:
        return Ratio(a.name, a, b, value, None, None)
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(np.array(row.samples), (RESAMPLES, len(row.samples))), axis=1) for row in (a, b)]
    low, high = np.quantile(medians[1] / medians[0], [0.025, 0.975]).tolist()
    return Ratio(a.name, a, b, value, low, high)


def as_text(a: BenchRecord, b: BenchRecord, found: list[Ratio]) -> str:
    """Return the differences between the two, and a Markdown table of ratios."""
    lines = [f"B against A: benchmark {a.bench}", f"A: {about(a)}", f"B: {about(b)}"]
    lines += differences("version of", a.versions, b.versions)
    lines += differences("setting", flat(a.settings), flat(b.settings))
    rows = [("what", "unit", "A", "B", "B / A", "")]
    for one in found:
        interval = "" if one.low is None else f" [{one.low:.3g}, {one.high:.3g}]"
        rows.append((one.name, one.a.unit, spread(one.a), spread(one.b), f"{one.value:.3g}{interval}", one.verdict))
    alone = {row.name for row in a.rows} ^ {row.name for row in b.rows}
    return "\n".join([*lines, "", markdown(rows), *(f"only in one of them: {name}" for name in sorted(alone))])


def differences(what: str, a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    """Return a line for each key whose values differ."""
    keys = dict.fromkeys([*a, *b])
    return [f"another {what} {key}: {a.get(key)}, {b.get(key)}" for key in keys if a.get(key) != b.get(key)]


def about(record: BenchRecord) -> str:
    """Return a line about a record's machine and command."""
    return (
        f"{record.date}, {record.devices} x {record.device}, commit {(record.commit or 'unknown')[:12]}, "
        f"load {record.load_average[0]:.1f}: {' '.join(record.command)}"
    )
