"""The record that every benchmark writes: one JSON schema with all raw samples, which `srlm bench compare` reads."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
from pydantic import with_config

from srlm_mega.errors import UserError
from srlm_mega.records import STRICT, parse_line
from srlm_mega.run.provenance import PACKAGES, commit, package_version

SCHEMA_VERSION = 1
Better = Literal["lower", "higher", "neither"]


@with_config(STRICT)
@dataclass(frozen=True)
class BenchRow:
    """One figure: raw samples in the order they were taken, and their quantiles (None without samples: `labels` or
    `extra` then say why). `labels` describe it in words (method, shape, part, ...), `extra` in numbers. `better` tells
    which direction is good."""

    name: str
    unit: str
    samples: tuple[float, ...]
    median: float | None
    p10: float | None
    p90: float | None
    better: Better = "lower"
    labels: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, float | None] = field(default_factory=dict)


@with_config(STRICT)
@dataclass(frozen=True)
class BenchRecord:
    """One benchmark on one machine with `devices` devices of the kind `device`. `settings` holds the configuration,
    shapes and options; `load_average` is the machine's at the end: on a busy machine only ratios mean anything."""

    schema_version: int
    bench: str
    date: str
    command: tuple[str, ...]
    commit: str | None
    device: str
    devices: int
    load_average: tuple[float, float, float]
    versions: Mapping[str, str | None]
    settings: Mapping[str, Any]
    rows: tuple[BenchRow, ...]

    def row(self, name: str) -> BenchRow:
        """Return the row of this name."""
        return next(row for row in self.rows if row.name == name)


def make_row(
    name: str,
    unit: str,
    samples: Sequence[float],
    better: Better = "lower",
    labels: Mapping[str, str] | None = None,
    extra: Mapping[str, float | None] | None = None,
) -> BenchRow:
    """Return a row with the quantiles of its samples, linearly interpolated."""
    low, median, high = np.quantile(samples, [0.1, 0.5, 0.9]).tolist() if samples else (None, None, None)
    return BenchRow(name, unit, tuple(samples), median, low, high, better, labels or {}, extra or {})


def make_record(
    bench: str,
    settings: Mapping[str, Any],
    rows: Iterable[BenchRow],
    packages: Iterable[str] = (),
    device: str | None = None,
    devices: int = 1,
) -> BenchRecord:
    """Return the record of a measurement that this process has just made; without a `device` it is this CPU's."""
    return BenchRecord(
        schema_version=SCHEMA_VERSION,
        bench=bench,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=tuple(command_of(sys.argv)),
        commit=commit(),
        device=device or f"CPU ({os.cpu_count()} cores)",
        devices=devices,
        load_average=os.getloadavg(),
        versions={name: package_version(name) for name in (*PACKAGES, *packages)},
        settings=settings,
        rows=tuple(rows),
    )


def command_of(argv: Sequence[str]) -> list[str]:
    """Return a command line without the options that leave the figures alone: two of the same measurement are equal."""
    words = (word for word in argv[1:] if word != "--started")
    return [Path(argv[0]).name, *without_options(words, ("--json",))]


def without_options(words: Iterable[str], names: Sequence[str]) -> list[str]:
    """Return a command line's words without these options and their values."""
    kept: list[str] = []
    left = iter(words)
    for word in left:
        if word in names:
            next(left, None)
        elif not word.startswith(tuple(f"{name}=" for name in names)):
            kept.append(word)
    return kept


def write_record(record: BenchRecord, path: Path | None) -> None:
    """Write the record as JSON where a file is named; a path or a tuple in the settings becomes text or a list."""
    if path is not None:
        options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
        path.write_bytes(orjson.dumps(asdict(record), default=str, option=options))


def read_record(path: Path) -> BenchRecord:
    """Read a record. UserError where the file is no record, is of another schema, or contradicts its own samples."""
    content = path.read_bytes()
    try:
        record = parse_line(BenchRecord, content)
    except ValueError as error:
        raise UserError(f"{path} is not what `srlm bench ... --json` writes: {error}") from None
    if record.schema_version != SCHEMA_VERSION:
        version = f"schema version {record.schema_version}, this srlm reads {SCHEMA_VERSION}"
        raise UserError(f"{path} has {version}: measure again, or compare with the srlm that wrote it")
    names = [row.name for row in record.rows]
    for row in record.rows:
        again = make_row(row.name, row.unit, row.samples)
        found, expected = ((one.median, one.p10, one.p90) for one in (row, again))
        if not same(found, expected):
            raise UserError(f"{path}: {row.name}: quantiles {found} are not those of its samples, {expected}")
        if names.count(row.name) > 1:
            raise UserError(f"{path}: two rows are called {row.name}")
    return record


def same(found: Sequence[float | None], expected: Sequence[float | None]) -> bool:
    """Tell whether two lists are equal up to rounding; None equals itself alone."""
    ours, theirs = (np.array(values, dtype=float) for values in (found, expected))
    return np.allclose(ours, theirs, rtol=1e-9, atol=0, equal_nan=True)


def spread(row: BenchRow, form: str = ".4g") -> str:
    """Return `median [p10, p90]`, or a dash for a row without samples."""
    if row.median is None or row.p10 is None or row.p90 is None:
        return "–"
    return f"{row.median:{form}} [{row.p10:{form}}, {row.p90:{form}}]"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is its header."""
    header, *lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *lines])


def table(record: BenchRecord) -> str:
    """Return all rows of a record as Markdown, with a line about the machine."""
    load = f"load {record.load_average[0]:.1f}"
    rows = [(row.name, spread(row), str(len(row.samples)), row.unit) for row in record.rows]
    return (
        f"{record.bench} on {record.devices} x {record.device}, {record.date[:10]}, {load}; median [p10, p90]\n\n"
        f"{markdown([('what', '', 'samples', 'unit'), *rows])}"
    )
