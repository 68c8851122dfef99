"""`srlm bench training --sweep KEY=V1,V2,...`: the same benchmark for several values of one setting, in one record.

Each value is measured by a `srlm bench training` of its own, so that the next one finds nothing of it (memory, compiled
code). A value that cannot be measured, for example because memory runs out, is named in the record and left out.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from srlm_mega.errors import UserError
from srlm_mega.launch.child_process import die_with
from srlm_mega.tools.bench_record import BenchRecord, command_of, read_record, write_record


@dataclass(frozen=True)
class Sweep:
    """A setting's dotted key and the values it takes, as they are written on a command line."""

    key: str
    values: tuple[str, ...]


def parse_sweep(text: str) -> Sweep:
    """Parse KEY=V1,V2,... UserError for fewer than two values, or one given twice."""
    key, _, values = text.partition("=")
    found = tuple(value for value in values.split(",") if value)
    if not key or len(found) < 2 or len(set(found)) < len(found):
        raise UserError(f"--sweep {text}: give a key and two or more values, such as model.seq_length=512,1024,2048")
    return Sweep(key, found)


def run_sweep(sweep: Sweep, argv: Sequence[str], json: Path) -> BenchRecord:
    """Measure every value with the command `argv` (without --sweep and --json), and write one record. UserError where
    no value could be measured."""
    measured: dict[str, BenchRecord] = {}
    failed: dict[str, int] = {}
    die = partial(die_with, os.getpid())
    with tempfile.TemporaryDirectory() as folder:
        for value in sweep.values:
            print(f"{sweep.key}={value}", flush=True)
            file = Path(folder) / "record.json"
            file.unlink(missing_ok=True)
            words = [*argv, f"{sweep.key}={value}", "--json", str(file)]
            done = subprocess.run(words, check=False, start_new_session=True, preexec_fn=die)
            if done.returncode == 0:
                measured[value] = read_record(file)
            else:
                failed[value] = done.returncode
                print(f"{sweep.key}={value} was not measured: exit code {done.returncode}", flush=True)
    if not measured:
        raise UserError(f"no value of {sweep.key} could be measured: correct what the errors above name")
    record = merged(sweep, measured, failed)
    write_record(record, json)
    return record


def merged(sweep: Sweep, measured: Mapping[str, BenchRecord], failed: Mapping[str, int]) -> BenchRecord:
    """Return the rows of all values in one record, each named and labelled with its value."""
    first, last = next(iter(measured.values())), list(measured.values())[-1]
    settings = {**first.settings, "sweep": {"key": sweep.key, "values": list(measured), "failed": dict(failed)}}
    rows = [
        replace(row, name=f"{row.name} at {sweep.key}={value}", labels={**row.labels, "what": row.name, "at": value})
        for value, record in measured.items()
        for row in record.rows
    ]
    return replace(last, date=first.date, command=tuple(command_of(sys.argv)), settings=settings, rows=tuple(rows))
