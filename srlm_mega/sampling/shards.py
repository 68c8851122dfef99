"""A long stage in shards: what a killed stage has to repeat is at most the shard it was in.

The requests are a fixed list; a shard is a slice of it with a seed of its own, so its records are the same whether the
stage ran through or was started ten times.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from srlm_mega.records import write_jsonl
from srlm_mega.run_dir import fsync
from srlm_mega.seeds import derive_seed

R = TypeVar("R")


@dataclass(frozen=True)
class Shard(Generic[R]):
    """A slice of the requests; `first` is the position of its first one in the whole list."""

    number: int
    first: int
    seed: int
    requests: Sequence[R]


def cut_into_shards(requests: Sequence[R], shard_size: int, run_seed: int, *names: str | int) -> list[Shard[R]]:
    """Slices of `shard_size` (the last may be shorter). A shard's seed is derived from the run's, the names of what it
    is for (round, purpose) and its number."""
    return [
        Shard(number, first, derive_seed(run_seed, *names, number), requests[first : first + shard_size])
        for number, first in enumerate(range(0, len(requests), shard_size))
    ]


def run_shards(
    shards: Sequence[Shard[R]],
    work: Callable[[Shard[R]], Iterable[Any]],
    output: Path,
    on_progress: Callable[[int, int], None],
) -> None:
    """Write the records of `work(shard)` for all shards, in order, as the JSONL `output`.

    Finished shards are `shard_00003.jsonl` in `<output>.shards/` beside it until the merge; a second call does only
    what is not there. The folder must belong to these shards: whoever changes the requests starts with an empty one.
    `on_progress(requests done, requests in all)` is called at the start and after each shard.
    """
    total = sum(len(shard.requests) for shard in shards)
    folder = output.with_name(f"{output.name}.shards")
    if not output.exists():
        folder.mkdir(parents=True, exist_ok=True)
        on_progress(0, total)
        for shard in shards:
            if not shard_file(folder, shard).exists():
                write_durably(shard_file(folder, shard), partial(write_records, work(shard)))
            on_progress(shard.first + len(shard.requests), total)
        write_durably(output, partial(merge, [shard_file(folder, shard) for shard in shards]))
    if folder.exists():
        shutil.rmtree(folder)


def shard_file(folder: Path, shard: Shard[R]) -> Path:
    """Where a finished shard lies until the merge."""
    return folder / f"shard_{shard.number:05d}.jsonl"


def write_records(records: Iterable[Any], path: Path) -> None:
    """Records as JSON lines, in the form `write_durably` asks for."""
    write_jsonl(path, records)


def merge(parts: Sequence[Path], path: Path) -> None:
    """The parts, one after the other, as one file."""
    with path.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)


def write_durably(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, bring it to the disk, and only then give it its name."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    fsync(temporary)
    os.rename(temporary, path)
    fsync(path.parent)
