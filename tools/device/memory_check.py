"""`srlm bench device`: the peak memory that a benchmark of training measured, beside what `srlm rehearse` predicts for
the same configuration without a GPU."""

import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from srlm_mega.config.model_sizes import GIB
from srlm_mega.errors import UserError
from srlm_mega.launch.child_process import die_with, srlm_command
from srlm_mega.tools.bench_record import BenchRecord, make_record, make_row, read_record, table, write_record

MEASURED = "memory/stage_0_"


def main(
    measured: Annotated[Path, typer.Argument(help="Record of `srlm bench training` in one process.")],
    words: Annotated[list[str], typer.Argument(help="Its configuration and overrides.")],
    json: Annotated[Path, typer.Option(help="The record to write.")],
) -> None:
    """Rehearse the configuration, and compare its peak with the measured one."""
    rehearsal = json.with_name(f"{json.stem}_rehearsal.json")
    die = partial(die_with, os.getpid())
    with rehearsal.open("wb") as file:
        done = subprocess.run([*srlm_command(), "rehearse", *words, "--json"], stdout=file, check=False, preexec_fn=die)
    if not rehearsal.stat().st_size:
        sys.exit(done.returncode or 1)
    record = compared(read_record(measured), orjson.loads(rehearsal.read_bytes()))
    write_record(record, json)
    print(table(record))


def compared(measured: BenchRecord, rehearsal: Mapping[str, Any]) -> BenchRecord:
    """Return the measured and the rehearsed peak of the only rank, and their ratio. UserError for several ranks."""
    ranks = rehearsal["ranks"]
    peaks = [row for row in measured.rows if row.name.startswith(MEASURED)]
    if len(ranks) != 1 or len(peaks) != 1:
        raise UserError(f"{len(ranks)} ranks were rehearsed and {len(peaks)} measured: give a layout of one process")
    (rank,), (peak,) = ranks, peaks
    rehearsed = rank["peak_bytes"] / GIB
    rows = [
        make_row("measured peak", "GiB", peak.samples, labels={"what": peak.name}),
        make_row("rehearsed peak", "GiB", [rehearsed], extra={"state": rank["state_bytes"] / GIB}),
        make_row("measured / rehearsed", "ratio", [sample / rehearsed for sample in peak.samples], "neither"),
    ]
    return make_record("memory check", measured.settings, rows, (), measured.device)


if __name__ == "__main__":
    typer.run(main)
