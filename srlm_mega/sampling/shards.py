"""Shards: slices of a stage's requests that survive a kill, and that several processes can share.

The requests are a fixed list, and a shard is a slice of it whose draws follow from its seed, so its records do not
depend on how often the stage was started, nor on which process made them. A killed stage repeats at most the shards
it was working on. Several processes (replicas) work on one list: each takes shards by lease files in the folder of the
finished shards (in_flight.py). Doing a shard twice does no harm.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import orjson

from srlm_mega.errors import CannotContinue
from srlm_mega.records import FailedRequest, parse_line, write_jsonl
from srlm_mega.run.files import discard, remove_folder, write_atomic, write_durably
from srlm_mega.run.sealed_file import contents, fingerprint, is_whole, write_sealed
from srlm_mega.sampling.finished_shard import FinishedShard, ShardReport
from srlm_mega.seeds import derive_seed

FAILED = "failed.jsonl"
WAIT_SECONDS = 0.2  # between two looks at the files of other processes
R = TypeVar("R")
A = TypeVar("A")


@dataclass(frozen=True)
class Shard(Generic[R]):
    """A slice of the requests. `first` is the position of its first request in the whole list, `position` the one that
    decides that request's draws together with `seed`: 0 where the shard has a seed of its own. `model` is the hash of
    the model that answers, where that is no output of the run and may become another one."""

    number: int
    first: int
    seed: int
    requests: Sequence[R]
    position: int = 0
    model: str = ""

    @cached_property
    def asked(self) -> str:
        """Hash of the requests, and of what decides their answers."""
        return fingerprint(self.number, self.seed, self.position, *filter(None, [self.model]), of=self.requests)


@dataclass(frozen=True)
class Answered:
    """Result of a shard. Requests in `failed` have no records; the token counts are for the metrics."""

    records: Sequence[Any]
    failed: Sequence[FailedRequest] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0

    def report(self, shard: Shard[Any], replica: int, queue_seconds: float, seconds: float) -> ShardReport:
        """Return the shard's report."""
        return ShardReport(
            shard=shard.number,
            replica=replica,
            requests=len(shard.requests),
            failed=len(self.failed),
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            queue_seconds=round(queue_seconds, 3),
            seconds=round(seconds, 3),
        )


def cut_into_shards(requests: Sequence[R], shard_size: int, run_seed: int, *names: str | int) -> list[Shard[R]]:
    """Cut requests into slices of `shard_size`; the last may be shorter. A shard's seed is derived from the run's seed,
    the names of its purpose (such as round and stage) and its number."""
    return [
        Shard(number, first, derive_seed(run_seed, *names, number), requests[first : first + shard_size])
        for number, first in enumerate(range(0, len(requests), shard_size))
    ]


def cut_one_call(requests: Sequence[R], shard_size: int, seed: int, model: str = "") -> list[Shard[R]]:
    """Cut requests into slices that share a seed, so that the draws do not depend on `shard_size`. `model`: as for
    `Shard`."""
    return [
        Shard(number, first, seed, requests[first : first + shard_size], first, model)
        for number, first in enumerate(range(0, len(requests), shard_size))
    ]


class ShardFiles(Generic[R]):
    """The shards of one output file, and their files until the merge.

    They lie in `<output>.shards/`: shard_00003.jsonl (finished), and .lease while a process works on the shard. The
    folder must belong to these shards: a caller that changes the requests starts with an empty one. `allowed` requests
    may fail for good, counted over all processes and attempts; None sets no limit here, for callers that count by
    themselves. Any other request has `each` records.
    """

    def __init__(self, shards: Sequence[Shard[R]], output: Path, allowed: int | None = None, each: int = 1) -> None:
        self.shards = shards
        self.output = output
        self.allowed = allowed
        self.each = each
        self.folder = output.with_name(f"{output.name}.shards")

    @property
    def merged(self) -> bool:
        """True when the output file is there as it was merged, from answers to these requests."""
        return is_whole(self.output, self._made_from())

    def missing(self) -> list[Shard[R]]:
        """Return the shards that no process has finished; none when the folder is gone, as all were merged."""
        names = self._names()
        return [] if names is None else [one for one in self.shards if name_of(one, ".jsonl") not in names]

    def finished(self) -> list[Shard[R]]:
        """Return the shards that some process has finished."""
        names = self._names() or set()
        return [shard for shard in self.shards if name_of(shard, ".jsonl") in names]

    def lease_next(self, replica: int, take_over_seconds: float, held: int = 0, replicas: int = 1) -> Shard[R] | None:
        """Take the first free shard for a replica, else one that another has held for too long; None without either,
        and when it holds its share of the unfinished ones already: others could begin at once what would only wait in
        its engine."""
        with self._while_there_is_a_folder():
            return self._lease_next(replica, take_over_seconds, held, replicas)
        return None

    def _lease_next(self, replica: int, take_over_seconds: float, held: int, replicas: int) -> Shard[R] | None:
        names = self._names()
        if names is None:
            return None
        unfinished = [shard for shard in self.shards if name_of(shard, ".jsonl") not in names]
        if held and held * replicas >= len(unfinished):
            return None
        free = [shard for shard in unfinished if name_of(shard, ".lease") not in names]
        leased = next((shard for shard in free if self.lease(shard, replica, take_over_seconds)), None)
        if leased is not None:
            return leased
        too_long = (one for one in unfinished if self._take_over(self._file(one, ".lease"), replica, take_over_seconds))
        return next(too_long, None)

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
            age, owner = time.time() - path.stat().st_mtime, path.read_bytes()
        except FileNotFoundError:  # released in between
            return False
        if age <= take_over_seconds or owner == str(replica).encode():
            return False
        write_atomic(path, str(replica).encode())
        return True

    def release(self, replica: int) -> None:
        """Remove the leases of a replica that ended."""
        for path in self.folder.glob("*.lease"):
            with suppress(FileNotFoundError):  # its new owner has finished the shard
                if path.read_bytes() == str(replica).encode():
                    path.unlink()

    def prepare(self) -> list[ShardReport]:
        """Create the folder, or clear an earlier attempt's leases, its replicas' reasons for ending and shards that are
        not as they were written from it; each of these is named, and done again. Returns the reports of the others."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [*self.folder.glob("*.lease"), *self.folder.glob("replica_*.progress.json")]:
            path.unlink()
        reports = []
        for shard in self.finished():
            try:
                reports.append(self.report(shard))
            except ValueError as error:
                print(f"{error}: the shard is done again", flush=True)
                self._file(shard, ".jsonl").unlink()
        return reports

    def finish(self, shard: Shard[R], answered: Answered, report: ShardReport) -> None:
        """Write a shard's file, and free the shard. Nothing happens when another has finished it and all are merged."""
        lines = b"".join(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in answered.records)
        content = FinishedShard(lines, report, tuple(answered.failed), shard.asked).as_bytes()
        with self._while_there_is_a_folder():
            write_durably(self._file(shard, ".jsonl"), lambda path: path.write_bytes(content), f"{report.replica}")
            self._file(shard, ".lease").unlink(missing_ok=True)

    def report(self, shard: Shard[R]) -> ShardReport:
        """Read the report of a finished shard. ValueError when the shard is not as it was written."""
        return self._load(shard).report

    def read(self, kind: type[A]) -> Iterator[A]:
        """Yield the records of all shards, `each` per request that did not fail, in order. CannotContinue as
        `check_failures`."""
        for loaded in self._all():
            yield from (parse_line(kind, line) for line in loaded.lines.splitlines())

    def check_failures(self) -> list[FailedRequest]:
        """Return the failed requests of all shards. CannotContinue when more than `allowed` failed, or a shard was
        damaged since it was written: the next attempt repeats such shards."""
        failures = [(shard, loaded.failed) for shard, loaded in zip(self.shards, self._all(), strict=True)]
        failed = [one for _, some in failures for one in some]
        if self.allowed is not None and len(failed) > self.allowed:
            for shard, some in failures:
                if some:
                    self._file(shard, ".jsonl").unlink()
            raise too_many_failed(failed, self.allowed)
        return failed

    def merge(self, write: Callable[[Path], object] | None = None) -> None:
        """Write the output by `write`, or the records of all shards, and the failures, if any, to failed.jsonl next to
        it. CannotContinue as `check_failures` does."""
        failed = self.check_failures()
        if failed:
            write_durably(self.output.with_name(FAILED), partial(write_jsonl, records=failed))
        else:  # that of an earlier comparison in this folder
            self.output.with_name(FAILED).unlink(missing_ok=True)
        write_sealed(self.output, write or self._concatenate, self._made_from())

    def tidy(self) -> None:
        """Remove the shards' folder, which nobody needs after the merge. It loses its name first: replicas that look
        for a shard at this moment put nothing into it any more."""
        removed = self.folder.with_name(f".{self.folder.name}.removed")
        if self.folder.exists():
            remove_folder(self.folder, removed)
        discard(removed)  # left by a removal that was killed

    @contextmanager
    def _while_there_is_a_folder(self) -> Iterator[None]:
        """End the block early when the folder is gone."""
        try:
            yield
        except FileNotFoundError:
            if self.folder.is_dir():
                raise

    def _names(self) -> set[str] | None:
        try:
            return set(os.listdir(self.folder))
        except FileNotFoundError:
            return None

    def _load(self, shard: Shard[R]) -> FinishedShard:
        """Read a finished shard. ValueError when it is not as it was written, or another's, or lacks records."""
        loaded, path = FinishedShard.load(self._file(shard, ".jsonl")), self._file(shard, ".jsonl")
        if loaded.asked != shard.asked:
            raise ValueError(f"{path} is another shard's, or answers other requests")
        records, failed, requests = loaded.lines.count(b"\n"), len(loaded.failed), len(shard.requests)
        if records != self.each * (requests - failed):
            raise ValueError(f"{path} has {records} records and {failed} failures of {requests} requests")
        return loaded

    def _made_from(self) -> str:
        """Return a hash of the requests, and of the failures that lie beside the output."""
        return fingerprint(contents(self.output.with_name(FAILED)), of=(shard.asked for shard in self.shards))

    def _all(self) -> Iterator[FinishedShard]:
        """Yield all shards. CannotContinue when one is not as it was written."""
        for shard in self.shards:
            try:
                yield self._load(shard)
            except ValueError as error:
                raise CannotContinue(f"{error}. The same command does the shard again") from None

    def _concatenate(self, path: Path) -> None:
        with path.open("wb") as file:
            file.writelines(loaded.lines for loaded in self._all())

    def _file(self, shard: Shard[R], suffix: str) -> Path:
        return self.folder / name_of(shard, suffix)


def name_of(shard: Shard[Any], suffix: str) -> str:
    """Return the name of one of a shard's files."""
    return f"shard_{shard.number:05d}{suffix}"


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
            held.append(f"replica {path.read_text(errors='replace')}, {minutes:.0f} min in {path.stem}")
    return held


def ignore(report: ShardReport) -> None:
    """Do nothing with a report: it stays in its file."""


def run_shards(
    files: ShardFiles[R],
    work: Callable[[Shard[R]], Answered],
    on_earlier: Callable[[ShardReport], None] = ignore,
    on_finished: Callable[[ShardReport], None] = ignore,
) -> None:
    """Work on all unfinished shards in this process, one after the other, and merge them. `on_earlier` gets the reports
    of shards that an earlier attempt finished, `on_finished` those of this one. CannotContinue when too many requests
    failed."""
    if not files.merged:
        for earlier in files.prepare():
            on_earlier(earlier)
        ready = time.monotonic()
        for shard in files.missing():
            begin = time.monotonic()
            answered = work(shard)
            report = answered.report(shard, 0, begin - ready, time.monotonic() - begin)
            files.finish(shard, answered, report)
            on_finished(report)
        files.merge()
    files.tidy()
