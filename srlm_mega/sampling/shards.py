"""A long stage in shards: what a killed stage has to repeat is at most the shards it was in.

The requests are a fixed list; a shard is a slice of it with a seed of its own, so its records are the same whether the
stage ran through or was started ten times, and whoever made them. Several processes (replicas) work on one list: each
takes shards by lease files in the folder where finished shards lie. Doing a shard twice does no harm.
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
WAIT_SECONDS = 0.2
R = TypeVar("R")


@dataclass(frozen=True)
class Shard(Generic[R]):
    """A slice of the requests; `first` is the position of its first one in the whole list."""

    number: int
    first: int
    seed: int
    requests: Sequence[R]


@dataclass(frozen=True)
class Answered:
    """What a shard came to. Requests in `failed` have no records; the tokens are for the metrics."""

    records: Sequence[Any]
    failed: Sequence[FailedRequest] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class ShardReport:
    """How a finished shard went. `queue_seconds`: from the replica's readiness to the shard's begin."""

    shard: int
    replica: int
    requests: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    queue_seconds: float
    seconds: float


def cut_into_shards(requests: Sequence[R], shard_size: int, run_seed: int, *names: str | int) -> list[Shard[R]]:
    """Slices of `shard_size` (the last may be shorter). A shard's seed is derived from the run's, the names of what it
    is for (round, purpose) and its number."""
    return [
        Shard(number, first, derive_seed(run_seed, *names, number), requests[first : first + shard_size])
        for number, first in enumerate(range(0, len(requests), shard_size))
    ]


class ShardFiles(Generic[R]):
    """The shards of one output, and their files in `<output>.shards/` beside it until the merge: shard_00003.jsonl
    (finished), .failed.jsonl, .report.json, and .lease while somebody works on it. The folder must belong to these
    shards: whoever changes the requests starts with an empty one. It tolerates `allowed` requests that fail for good
    (None: whoever answers counts), whichever processes and attempts they failed in."""

    def __init__(self, shards: Sequence[Shard[R]], output: Path, allowed: int | None = None) -> None:
        self.shards = shards
        self.output = output
        self.allowed = allowed
        self.folder = output.with_name(f"{output.name}.shards")

    @property
    def merged(self) -> bool:
        """Whether the output is there."""
        return self.output.exists()

    def missing(self) -> list[Shard[R]]:
        """Shards that nobody has finished."""
        return [shard for shard in self.shards if not self._file(shard, ".jsonl").exists()]

    def finished(self) -> list[Shard[R]]:
        """Shards whose records are whole, whoever made them."""
        return [shard for shard in self.shards if self._file(shard, ".jsonl").exists()]

    def lease(self, shard: Shard[R], replica: int, take_over_seconds: float) -> bool:
        """Take a shard that is free, or that another replica has had for too long; whether it is ours now."""
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
        except FileNotFoundError:  # given back in between
            return False
        if age <= take_over_seconds or owner == str(replica):
            return False
        write_atomic(path, str(replica).encode())
        return True

    def release(self, replica: int) -> None:
        """Give back what an ended replica had."""
        for path in self.folder.glob("*.lease"):
            with suppress(FileNotFoundError):  # its new owner has finished the shard
                if path.read_text() == str(replica):
                    path.unlink()

    def prepare(self) -> None:
        """Begin or go on: leases of an earlier attempt, and what its replicas said at their end, are out of date."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [*self.folder.glob("*.lease"), *self.folder.glob("replica_*.progress.json")]:
            path.unlink()

    def finish(self, shard: Shard[R], answered: Answered, report: ShardReport) -> None:
        """Write a shard's files, the one that says it is finished last."""
        suffix = f"tmp{report.replica}"
        if answered.failed:
            write_durably(self._file(shard, ".failed.jsonl"), partial(write_jsonl, records=answered.failed), suffix)
        else:  # those of an attempt that did not get to its records
            self._file(shard, ".failed.jsonl").unlink(missing_ok=True)
        write_atomic(self._file(shard, ".report.json"), orjson.dumps(asdict(report)))
        write_durably(self._file(shard, ".jsonl"), partial(write_jsonl, records=answered.records), suffix)
        self._file(shard, ".lease").unlink(missing_ok=True)

    def report(self, shard: Shard[R]) -> ShardReport:
        """Of a finished shard."""
        return ShardReport(**orjson.loads(self._file(shard, ".report.json").read_bytes()))

    def merge(self) -> None:
        """All shards as one file, failures as another; without any there is none. CannotContinue when too many failed:
        the next attempt asks the shards that have failures again."""
        with_failures = [shard for shard in self.shards if self._file(shard, ".failed.jsonl").exists()]
        parts = [self._file(shard, ".failed.jsonl") for shard in with_failures]
        failed = [one for part in parts for one in read_jsonl(part, FailedRequest)]
        if self.allowed is not None and len(failed) > self.allowed:
            for shard in with_failures:
                self._file(shard, ".jsonl").unlink()
            raise too_many_failed(failed, self.allowed)
        if failed:
            write_durably(self.output.with_name(FAILED), partial(concatenate, parts))
        else:  # one of an earlier comparison in this folder
            self.output.with_name(FAILED).unlink(missing_ok=True)
        write_durably(self.output, partial(concatenate, [self._file(shard, ".jsonl") for shard in self.shards]))

    def tidy(self) -> None:
        """Remove what the merge made superfluous."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _file(self, shard: Shard[R], suffix: str) -> Path:
        return self.folder / f"shard_{shard.number:05d}{suffix}"


def too_many_failed(failed: Sequence[FailedRequest], allowed: int) -> CannotContinue:
    """Return the error that ends a stage whose failed requests are more than `allowed`."""
    return CannotContinue(
        f"{len(failed)} requests failed for good, sampler.max_failed_share allows {allowed}. The last is "
        f"{failed[-1].id}: {failed[-1].error}. What is finished is kept; once the cause is gone, the same command "
        "goes on"
    )


def held_shards(folder: Path) -> list[str]:
    """Who works on which shard of a stage's folder, and for how long, in words."""
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
    """Do all shards that are not there in this process, in order, and merge them. `on_earlier` is called for those of
    an earlier attempt, `on_finished` for each of this one."""
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
    """Work on shards that nobody else has until all are finished, whoever finished them."""
    ready = time.monotonic()
    while missing := files.missing():
        shard = next((one for one in missing if files.lease(one, replica, take_over_seconds)), None)
        if shard is None:  # others work on all that is left; one of them may yet fall out
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
    """The parts, one after the other, as one file."""
    with path.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)


def write_durably(path: Path, write: Callable[[Path], object], suffix: str = "tmp") -> None:
    """Let `write` fill a temporary file (`suffix` tells apart those of several processes), bring it to the disk, and
    only then give it its name."""
    temporary = path.with_name(f".{path.name}.{suffix}")
    write(temporary)
    fsync(temporary)
    os.rename(temporary, path)
    fsync(path.parent)
