"""Shards in flight: one process's work on a list of requests, with the engine kept full.

A shard is the unit of files, seeds and takeover, not of submission: the engine takes requests of as many shards as it
has room for, and a shard is committed when its last answer is there. A backend whose arithmetic must not depend on
other shards gets one shard at a time.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace

from srlm_mega.records import FailedRequest, PromptTokens, SampledText, SampledTexts
from srlm_mega.sampling.sampler import Answer, Completion, EngineDied, Request, Sampler, SamplingParams
from srlm_mega.sampling.sampling_rate import Watch
from srlm_mega.sampling.shards import WAIT_SECONDS, Answered, Shard, ShardFiles, too_many_failed

# Backends raise these when an engine, a device or a connection fails. A ValueError would only be raised again.
TRANSIENT = (RuntimeError, OSError)
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0


@dataclass(frozen=True)
class Taker:
    """How a process takes shards: its number among the replicas, the seconds after which it takes over another's shard,
    the tries of a request, whether its engine works on several shards at once, and how many replicas share them now."""

    replica: int = 0
    take_over_seconds: float = float("inf")
    attempts: int = 3
    mixes_shards: bool = False
    replicas: Callable[[], int] = lambda: 1


@dataclass(frozen=True)
class OpenShard:
    """A shard that is being worked on: when it was taken, and the results so far by their place in it."""

    shard: Shard[PromptTokens]
    begin: float
    results: dict[int, SampledTexts | FailedRequest] = field(default_factory=dict)

    def request(self, place: int, params: SamplingParams) -> Request:
        """Return the request to the sampler at a place of the shard."""
        return Request(self.shard.requests[place].token_ids, params, self.shard.position + place)


class ShardsInFlight:
    """Answers the shards of `files` with a sampler. `params`: their decoding, to which each shard adds its seed;
    `as_text` turns a completion into its record; `watch` is told of answers and finished shards. `clock` and `sleep`
    are the time by which it waits and measures."""

    def __init__(
        self,
        files: ShardFiles[PromptTokens],
        params: SamplingParams,
        sampler: Sampler,
        as_text: Callable[[Completion], SampledText],
        taker: Taker,
        watch: Watch,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._files, self._params, self._sampler, self._as_text, self._taker = files, params, sampler, as_text, taker
        self._watch, self._clock, self._sleep = watch, clock, sleep
        self._ready = clock()
        self._open: dict[int, OpenShard] = {}  # by number
        self._places: dict[tuple[int, int], tuple[OpenShard, int]] = {}  # of what has no result, by seed and position
        self._tries: dict[tuple[int, int], int] = {}
        self._again: deque[Request] = deque()
        self._failed: list[FailedRequest] = []
        self._file_error: OSError | None = None

    def run(self) -> None:
        """Work on shards that no other process holds, until all shards are finished. CannotContinue when more requests
        have failed than are allowed; EngineDied when the engine answers nothing any more."""
        failures = 0  # one after the other, without an answer in between
        while self._files.missing():
            worked = False
            with closing(self._requests()) as requests:
                answers = iter(self._sampler.stream(requests))
                try:
                    while (answer := self._next(answers)) is not None:
                        failures, worked = 0, True
                        self._take(answer)
                except EngineStumbled as error:
                    failures += 1
                    self._recover(failures, error)
                finally:
                    answers.close()  # type: ignore[attr-defined]
            if (
                not worked and not self._open
            ):  # others hold all that is left; one of them may still end, and release its shards
                self._sleep(WAIT_SECONDS)

    def _next(self, answers: Iterator[Answer]) -> Answer | None:
        """Return the next answer, None at the end. EngineStumbled for an error of the sampler's, not of our files."""
        try:
            answer = next(answers, None)
        except EngineDied:
            raise
        except TRANSIENT as error:
            if self._file_error is None:
                raise EngineStumbled(repr(error)) from error
        if self._file_error is not None:
            raise self._file_error
        return answer

    def _requests(self) -> Generator[Request, None, None]:
        """Yield what was to be tried again, then the requests of one shard after the other, taken when it is needed."""
        while self._again:
            yield self._again.popleft()
        while True:
            try:
                shard = self._files.lease_next(
                    self._taker.replica, self._taker.take_over_seconds, len(self._open), self._taker.replicas()
                )
            except OSError as error:
                self._file_error = error
                return
            if shard is None:
                return
            opened = self._open[shard.number] = OpenShard(shard, self._clock())
            params = replace(self._params, seed=shard.seed)
            requests = [opened.request(place, params) for place in range(len(shard.requests))]
            self._places |= {key_of(request): (opened, place) for place, request in enumerate(requests)}
            yield from requests
            if not self._taker.mixes_shards:
                return
            while self._again:
                yield self._again.popleft()

    def _take(self, answer: Answer) -> None:
        key = key_of(answer.request)
        opened, place = self._places[key]
        name = opened.shard.requests[place].id
        if answer.error:
            self._tries[key] = self._tries.get(key, 0) + 1
            if self._tries[key] < self._taker.attempts:
                self._again.append(answer.request)
                return
            failed = FailedRequest(name, answer.error, self._tries[key])
            self._failed.append(failed)
            if self._files.allowed is not None and len(self._failed) > self._files.allowed:
                raise too_many_failed(self._failed, self._files.allowed)
            opened.results[place] = failed
        else:
            opened.results[place] = SampledTexts(name, tuple(map(self._as_text, answer.completions)))
        del self._places[key]
        self._watch.answered()
        if len(opened.results) == len(opened.shard.requests):
            self._commit(self._open.pop(opened.shard.number))

    def _commit(self, opened: OpenShard) -> None:
        results = [opened.results[place] for place in range(len(opened.shard.requests))]
        records = [result for result in results if isinstance(result, SampledTexts)]
        answered = Answered(
            records,
            [result for result in results if isinstance(result, FailedRequest)],
            prompt_tokens=sum(len(request.token_ids) for request in opened.shard.requests),
            output_tokens=sum(len(one.token_ids) for record in records for one in record.completions),
        )
        seconds = self._clock() - opened.begin
        report = answered.report(opened.shard, self._taker.replica, opened.begin - self._ready, seconds)
        self._files.finish(opened.shard, answered, report)
        self._watch.finished(report)

    def _recover(self, failures: int, error: "EngineStumbled") -> None:
        """After an error that cost all requests in flight: wait, see whether the engine still lives, and send them
        again; after as many errors as a request has tries, one by one."""
        waiting = [opened.request(place, self._seeded(opened)) for opened, place in self._places.values()]
        print(f"the sampler failed with {len(waiting)} requests in flight: {error}", flush=True)
        if waiting:
            self._wait_for_life(waiting[0], failures, error)
        if failures < self._taker.attempts:
            self._again = deque(waiting)
            return
        print(f"each of {len(waiting)} requests is now sent alone", flush=True)
        self._again = deque()
        for request in waiting:
            self._alone(request)

    def _alone(self, request: Request) -> None:
        for attempt in range(1, self._taker.attempts + 1):
            try:
                (answer,) = self._sampler.stream(iter([request]))
            except EngineDied:
                raise
            except TRANSIENT as error:
                answer = Answer(request, error=repr(error))
                self._wait_for_life(request, attempt, EngineStumbled(repr(error)))
            self._take(answer)
            self._again.clear()  # it is tried again right here
            if key_of(request) not in self._places:
                return

    def _wait_for_life(self, request: Request, failures: int, error: "EngineStumbled") -> None:
        """Wait the longer the more failures there were, then ask for one token. EngineDied when there is no answer in
        as many tries as a request has."""
        probe = SamplingParams(n=1, temperature=0.0, top_p=1.0, max_new_tokens=1, seed=0)
        for attempt in range(self._taker.attempts):
            self._sleep(min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (failures - 1 + attempt)))
            try:
                self._sampler.sample([request.prompt[:1]], probe)
                return
            except TRANSIENT as no_answer:
                print(f"the sampler does not answer: {no_answer!r}", flush=True)
        raise EngineDied(f"the sampler answers nothing any more; it failed with {error}") from error

    def _seeded(self, opened: OpenShard) -> SamplingParams:
        return replace(self._params, seed=opened.shard.seed)


class EngineStumbled(Exception):
    """The sampler raised an error; requests that had no answer may be sent again."""


def key_of(request: Request) -> tuple[int, int]:
    """Return what tells a request from all others of a list: its seed and its position."""
    return request.params.seed, request.position
