"""Start a node's ranks for a short time, and say how they ended: the ranks leave their places in files."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from srlm_mega.launch.allreduce_findings import RankPlace, RanksOutcome
from srlm_mega.launch.child_process import die_with


def run_ranks(
    argv: Sequence[str],
    environment: Mapping[str, str],
    node: str,
    first_rank: int,
    folder: Path,
    log_file: Path,
    seconds: float,
) -> RanksOutcome:
    """Run torchrun's `argv` for at most `seconds`. Its ranks write `folder`/rank_N: a count, a place, perhaps an error
    behind a line's end."""
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=partial(die_with, os.getpid()),
        )
        try:
            code, in_time = process.wait(seconds), True
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code, in_time = process.wait(), False
    read = {int(file.name.removeprefix("rank_")): file.read_text() for file in folder.glob("rank_*")}
    errors = [f"rank {rank}: {error}" for rank, text in sorted(read.items()) if (error := text.partition("\n")[2])]
    if in_time and code and not errors:  # torchrun, or a rank that was killed
        errors = [f"torchrun ended with {code}: {last_line(log_file)}"]
    places = tuple(place_of(rank, text) for rank, text in sorted(read.items()))
    return RanksOutcome(node, first_rank, in_time, places, "; ".join(errors))


def place_of(rank: int, text: str) -> RankPlace:
    """From its file's first line: `3 the all-reduce of DP`."""
    count, _, name = text.partition("\n")[0].partition(" ")
    return RankPlace(rank, int(count), name)


def last_line(log_file: Path) -> str:
    """What was said last."""
    lines = log_file.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing said")
