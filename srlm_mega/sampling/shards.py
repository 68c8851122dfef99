"""Shards: slices of a stage's requests that survive a kill, and that several processes can share.

The requests are a fixed list; a shard is a slice of it with a seed of its own, so its records are the same whether the
stage ran through or was started ten times, and whichever process made them. A killed stage repeats at most the shards
it was working on. Several processes (replicas) work on one list: each takes shards by lease files in the folder of the
finished shards. Doing a shard twice does no harm.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import orjson

from srlm_mega.errors import CannotContinue
from srlm_mega.records import FailedRequest, read_jsonl, write_jsonl
from srlm_mega.run.files import fsync, write_atomic
from srlm_mega.seeds import derive_seed

FAILED = "failed.jsonl"
WAIT_SECONDS = 0.2  # between two looks at the files of other processes
R = TypeVar("R")


@dataclass(frozen=True)
class Shard(Generic[R]):
    """A slice of the requests with its own seed; `first` is the position of its first request in the whole list."""

    number: int
    first: int
    seed: int
    requests: Sequence[R]


@dataclass(frozen=True)
class Answered:
    """Result of a shard. Requests in `failed` have no records; the token counts are for the metrics."""

    records: Sequence[Any]
    failed: Sequence[FailedRequest] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class ShardReport:
    """Counts and seconds of a finished shard. `queue_seconds`: from the replica's readiness to the shard's start."""

    shard: int
    replica: int
    requests: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    queue_seconds: float
    seconds: float


def cut_into_shards(requests: Sequence[R], shard_size: int, run_seed: int, *names: str | int) -> list[Shard[R]]:
    """Cut requests into slices of `shard_size`; the last may be shorter. A shard's seed is derived from the run's seed,
    the names of its purpose (such as round and stage) and its number."""
    return [
        Shard(number, first, derive_seed(run_seed, *names, number), requests[first : first + shard_size])
        for number, first in enumerate(range(0, len(requests), shard_size))
    ]


class ShardFiles(Generic[R]):
    """The shards of one output file, and their files until the merge.

    They lie in `<output>.shards/`: shard_00003.jsonl (finished), .failed.jsonl, .report.json, and .lease while a
    process works on the shard. The folder must belong to these shards: a caller that changes the requests starts with
    an empty one. `allowed` requests may fail for good, counted over all processes and attempts; None sets no limit
    here, for callers that count by themselves.
    """

    def __init__(self, shards: Sequence[Shard[R]], output: Path, allowed: int | None = None) -> None:
        self.shards = shards
        self.output = output
        self.allowed = allowed
        self.folder = output.with_name(f"{output.name}.shards")

    @property
    def merged(self) -> bool:
        """True when the output file exists."""
        return self.output.exists()

    def missing(self) -> list[Shard[R]]:
        """Return the shards that no process has finished."""
        return [shard for shard in self.shards if not self._file(shard, ".jsonl").exists()]

    def finished(self) -> list[Shard[R]]:
        """Return the shards that some process has finished."""
        return [shard for shard in self.shards if self._file(shard, ".jsonl").exists()]

    def lease(self, shard: Shard[R], replica: int, take_over_seconds: float) -> bool:
        """Take a shard for a replica if it is free, or if another replica has held it for more than
        `take_over_seconds`. Returns True when it was taken and is not finished."""
        path = self._file(shard, ".lease")
        draft = path.with_name(f".{path.name}.{replica}")
        draft.write_text(str(replica))
        try:
            os.link(draft, path)  # it appears with its content, and for one replica only
        except FileExistsError:
            if not self._take_over(path, replica, take_over_seconds):
                return False
        finally:
            draft.unlink()
        if self._file(shard, ".jsonl").exists():  # finished since the caller looked
            path.unlink(missing_ok=True)
            return False
        return True

    def _take_over(self, path: Path, replica: int, take_over_seconds: float) -> bool:
        try:
            age, owner = time.time() - path.stat().st_mtime, path.read_text()
        except FileNotFoundError:  # released in between
            return False
        if age <= take_over_seconds or owner == str(replica):
            return False
        write_atomic(path, str(replica).encode())
        return True

    def release(self, replica: int) -> None:
        """Remove the leases of a replica that ended."""
        for path in self.folder.glob("*.lease"):
            with suppress(FileNotFoundError):  # its new owner has finished the shard
                if path.read_text() == str(replica):
                    path.unlink()

    def prepare(self) -> None:
        """Create the folder, or clear an earlier attempt's leases and its replicas' reasons for ending from it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [*self.folder.glob("*.lease"), *self.folder.glob("replica_*.progress.json")]:
            path.unlink()

    def finish(self, shard: Shard[R], answered: Answered, report: ShardReport) -> None:
        """Write a shard's files; its records come last, because they mark it as finished."""
        suffix = f"tmp{report.replica}"
        if answered.failed:
            write_durably(self._file(shard, ".failed.jsonl"), partial(write_jsonl, records=answered.failed), suffix)
        else:  # failures of an attempt that was killed before it wrote its records
            self._file(shard, ".failed.jsonl").unlink(missing_ok=True)
        write_atomic(self._file(shard, ".report.json"), orjson.dumps(asdict(report)))
        write_durably(self._file(shard, ".jsonl"), partial(write_jsonl, records=answered.records), suffix)
        self._file(shard, ".lease").unlink(missing_ok=True)

    def report(self, shard: Shard[R]) -> ShardReport:
        """Read the report of a finished shard."""
        return ShardReport(**orjson.loads(self._file(shard, ".report.json").read_bytes()))

    def merge(self) -> None:
        """Write the records of all shards to the output, and their failures, if any, to failed.jsonl next to it.
        CannotContinue when more than `allowed` failed: the next attempt repeats the shards that have failures."""
        with_failures = [shard for shard in self.shards if self._file(shard, ".failed.jsonl").exists()]
        parts = [self._file(shard, ".failed.jsonl") for shard in with_failures]
        failed = [one for part in parts for one in read_jsonl(part, FailedRequest)]
        if self.allowed is not None and len(failed) > self.allowed:
            for shard in with_failures:
                self._file(shard, ".jsonl").unlink()
            raise too_many_failed(failed, self.allowed)
        if failed:
            write_durably(self.output.with_name(FAILED), partial(concatenate, parts))
        else:  # that of an earlier comparison in this folder
            self.output.with_name(FAILED).unlink(missing_ok=True)
        write_durably(self.output, partial(concatenate, [self._file(shard, ".jsonl") for shard in self.shards]))

    def tidy(self) -> None:
        """Remove the shards' folder, which nobody needs after the merge."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _file(self, shard: Shard[R], suffix: str) -> Path:
        return self.folder / f"shard_{shard.number:05d}{suffix}"


def too_many_failed(failed: Sequence[FailedRequest], allowed: int) -> CannotContinue:
    """Return the error that ends a stage whose failed requests are more than `allowed`."""
    return CannotContinue(
        f"{len(failed)} requests failed for good, sampler.max_failed_share allows {allowed}. The last is "
        f"{failed[-1].id}: {failed[-1].error}. What is finished is kept; once the cause is gone, the same command "
        "resumes the stage"
    )


def held_shards(folder: Path) -> list[str]:
    """Return a line for each leased shard in a stage's folder: which replica holds it, and for how many minutes."""
    held = []
    for path in sorted(folder.glob("*.shards/*.lease")):
        with suppress(FileNotFoundError):  # finished in between
            minutes = (time.time() - path.stat().st_mtime) / 60
            held.append(f"replica {path.read_text()}, {minutes:.0f} min in {path.stem}")
    return held


def ignore(report: ShardReport) -> None:
    """Do nothing with a report: it stays in its file."""


def run_shards(
    files: ShardFiles[R],
    work: Callable[[Shard[R]], Answered],
    on_earlier: Callable[[ShardReport], None] = ignore,
    on_finished: Callable[[ShardReport], None] = ignore,
) -> None:
    """Work on all unfinished shards in this process, in order, and merge them. `on_earlier` gets the reports of shards
    that an earlier attempt finished, `on_finished` those of this one. CannotContinue when too many requests failed."""
    if not files.merged:
        files.prepare()
        for shard in files.finished():
            on_earlier(files.report(shard))
        take_shards(files, work, 0, float("inf"), on_finished)
        files.merge()
    files.tidy()


def take_shards(
    files: ShardFiles[R],
    work: Callable[[Shard[R]], Answered],
    replica: int,
    take_over_seconds: float,
    on_finished: Callable[[ShardReport], None] = ignore,
) -> None:
    """Work on shards that no other process holds, until all shards are finished. A shard that another replica has held
    for more than `take_over_seconds` is taken over."""
    ready = time.monotonic()
    while missing := files.missing():
        shard = next((one for one in missing if files.lease(one, replica, take_over_seconds)), None)
        if shard is None:  # others hold all that is left; one of them may still end, and release its shard
            time.sleep(WAIT_SECONDS)
            continue
        begin = time.monotonic()
        answered = work(shard)
        report = ShardReport(
            shard=shard.number,
            replica=replica,
            requests=len(shard.requests),
            failed=len(answered.failed),
            prompt_tokens=answered.prompt_tokens,
            output_tokens=answered.output_tokens,
            queue_seconds=round(begin - ready, 3),
            seconds=round(time.monotonic() - begin, 3),
        )
        files.finish(shard, answered, report)
        on_finished(report)


def concatenate(parts: Sequence[Path], path: Path) -> None:
    """Write the parts one after the other to one file."""
    with path.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)


def write_durably(path: Path, write: Callable[[Path], object], suffix: str = "tmp") -> None:
    """Let `write` fill a temporary file, sync it to the disk, and only then give it its name. `suffix` keeps the
    temporary files of several processes apart."""
    temporary = path.with_name(f".{path.name}.{suffix}")
    write(temporary)
    fsync(temporary)
    os.rename(temporary, path)
    fsync(path.parent)
