"""Shards in flight: what fails for a moment succeeds, what is poisoned is recorded, seeds stay what they were, and an
engine that is dead is told from a request that is bad."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from scripted_sampler import OneCallSampler

from srlm_mega.errors import CannotContinue
from srlm_mega.records import FailedRequest, PromptTokens, SampledText, SampledTexts
from srlm_mega.sampling.in_flight import ShardsInFlight, Taker
from srlm_mega.sampling.sampler import Answer, Completion, EngineDied, Request, Sampler, SamplingParams
from srlm_mega.sampling.sampling_rate import Unwatched
from srlm_mega.sampling.shards import ShardFiles, cut_into_shards, cut_one_call
from srlm_mega.seeds import derive_seed

PARAMS = SamplingParams(n=2, temperature=1.0, top_p=1.0, max_new_tokens=4, seed=11)
REQUESTS = [PromptTokens(f"p{number}", (number,)) for number in range(6)]


class Fragile(OneCallSampler):
    """Raises `errors` at its first calls, and for poisoned prompts always. A call for one token is a sign of life."""

    def __init__(self, *errors: Exception, poisoned: Sequence[int] = (), dead: bool = False) -> None:
        self.errors, self.poisoned, self.dead = list(errors), poisoned, dead
        self.calls: list[int] = []
        self.signs = 0

    def sample(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, first: int = 0
    ) -> list[list[Completion]]:
        if params.max_new_tokens == 1:
            self.signs += 1
            if self.dead:
                raise RuntimeError("executor is dead")
            return [[Completion((7,), "length", 0)]]
        self.calls.append(len(prompts))
        if self.errors:
            raise self.errors.pop(0)
        if any(prompt[0] in self.poisoned for prompt in prompts):
            raise RuntimeError("cuda error")
        seeds = [derive_seed(params.seed, first + place) for place in range(len(prompts))]
        return [[Completion((seed,), "length", seed)] * params.n for seed in seeds]


class OneByOne(OneCallSampler):
    """A continuous engine: it holds `room` requests, and answers the youngest of them first. Requests of `refused` ids
    fail by themselves, as often as it says."""

    def __init__(self, room: int = 4, refused: dict[int, int] | None = None) -> None:
        self.room, self.refused = room, dict(refused or {})
        self.most = 0
        self.closed = 0

    def stream(self, requests: Iterator[Request]) -> Iterator[Answer]:
        held: list[Request] = []
        try:
            while True:
                while len(held) < self.room and (request := next(requests, None)) is not None:
                    held.append(request)
                self.most = max(self.most, len(held))
                if not held:
                    return
                request = held.pop()
                if self.refused.get(request.prompt[0], 0):
                    self.refused[request.prompt[0]] -= 1
                    yield Answer(request, error="no such thing")
                else:
                    seed = derive_seed(request.params.seed, request.position)
                    yield Answer(request, (Completion((seed,), "length", seed),) * request.params.n)
        finally:
            self.closed += 1


def text_of(completion: Completion) -> SampledText:
    return SampledText("", completion.token_ids, completion.finish_reason, completion.seed)


def files_of(folder: Path, allowed: int = 0, size: int = 6) -> ShardFiles[PromptTokens]:
    files = ShardFiles(cut_one_call(REQUESTS, size, PARAMS.seed), folder / "answers", allowed)
    files.prepare()
    return files


def answered(
    files: ShardFiles[PromptTokens], sampler: Sampler, waits: list[float] | None = None, mixes: bool = False
) -> list[SampledTexts]:
    """The answers of all shards; `waits` gets the seconds that it would have slept."""
    sleep = ([] if waits is None else waits).append
    ShardsInFlight(files, PARAMS, sampler, text_of, Taker(mixes_shards=mixes), Unwatched(), sleep=sleep).run()
    return list(files.read(SampledTexts))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[SampledTexts]:
    """The answers without any trouble."""
    found = answered(files_of(tmp_path_factory.mktemp("whole")), Fragile())
    assert [one.id for one in found] == [one.id for one in REQUESTS]
    return found


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ConnectionError("reset"), TimeoutError()])
def test_a_passing_error_costs_a_wait_that_grows(tmp_path: Path, error: Exception, whole: list[SampledTexts]) -> None:
    fragile, waits = Fragile(error, error), list[float]()
    assert answered(files_of(tmp_path), fragile, waits) == whole
    assert fragile.calls == [6, 6, 6] and waits == [1.0, 2.0] and fragile.signs == 2


def test_a_poisoned_request_costs_only_itself(tmp_path: Path, whole: list[SampledTexts]) -> None:
    fragile, files = Fragile(poisoned=[4]), files_of(tmp_path, allowed=1)
    assert answered(files, fragile) == whole[:4] + whole[5:]
    assert files.check_failures() == [FailedRequest("p4", "RuntimeError('cuda error')", 3)]
    assert fragile.calls == [6] * 3 + [1] * 4 + [1] * 3 + [1]


def test_more_failures_than_allowed_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(CannotContinue, match=r"2 requests failed for good, .* allows 1\. The last is p4: .*cuda error"):
        answered(files_of(tmp_path, allowed=1), Fragile(poisoned=[1, 4]))


def test_a_mistake_is_not_tried_again(tmp_path: Path) -> None:
    fragile = Fragile(ValueError("prompt 0 has no tokens"))
    with pytest.raises(ValueError, match="no tokens"):
        answered(files_of(tmp_path), fragile)
    assert fragile.calls == [6]


def test_a_dead_engine_is_asked_for_a_sign_of_life_and_not_for_every_request(tmp_path: Path) -> None:
    fragile, waits = Fragile(*[RuntimeError("executor is dead")] * 99, dead=True), list[float]()
    with pytest.raises(EngineDied, match="answers nothing any more"):
        answered(files_of(tmp_path), fragile, waits)
    assert fragile.calls == [6] and fragile.signs == 3 and waits == [1.0, 2.0, 4.0]


def test_an_engine_that_says_it_died_is_believed(tmp_path: Path) -> None:
    fragile = Fragile(EngineDied("gone"))
    with pytest.raises(EngineDied, match="gone"):
        answered(files_of(tmp_path), fragile)
    assert fragile.signs == 0


def test_what_a_request_fails_by_itself_costs_nothing_else(tmp_path: Path, whole: list[SampledTexts]) -> None:
    engine, files = OneByOne(refused={2: 2, 5: 3}), files_of(tmp_path, allowed=1, size=2)
    assert answered(files, engine, mixes=True) == whole[:5]
    assert files.check_failures() == [FailedRequest("p5", "no such thing", 3)], "and p2 had its answer at the third try"


@pytest.mark.parametrize(("mixes", "most"), [(True, 4), (False, 2)])
def test_an_engine_holds_as_much_as_it_has_room_for(
    tmp_path: Path, whole: list[SampledTexts], mixes: bool, most: int
) -> None:
    """Or one shard, where what it computes together decides the bits."""
    engine = OneByOne(room=4)
    assert answered(files_of(tmp_path, size=2), engine, mixes=mixes) == whole
    assert engine.most == most


def test_the_draws_do_not_depend_on_the_size_of_shards(tmp_path: Path, whole: list[SampledTexts]) -> None:
    for size in (1, 4, 6):
        assert answered(files_of(tmp_path / str(size), size=size), OneByOne(), mixes=True) == whole


def test_a_full_disk_is_not_the_engines_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, fragile = files_of(tmp_path), Fragile()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "lease_next", full)
    with pytest.raises(OSError, match="No space"):
        answered(files, fragile)
    assert (fragile.calls, fragile.signs) == ([], 0)


def test_leaving_early_aborts_what_is_in_flight(tmp_path: Path) -> None:
    engine = OneByOne(refused={5: 9})
    with pytest.raises(CannotContinue):
        answered(files_of(tmp_path), engine, mixes=True)
    assert engine.closed == 1


@pytest.mark.timing
def test_two_take_every_shard_once(tmp_path: Path) -> None:
    """Two takers at once; the barrier proves that neither did all alone."""
    files = ShardFiles(cut_into_shards(REQUESTS, 1, 7, 1, "test"), tmp_path / "answers", 0)
    files.prepare()
    both = threading.Barrier(2, timeout=20)

    class Waiting(Fragile):
        def sample(
            self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, first: int = 0
        ) -> list[list[Completion]]:
            if prompts[0][0] < 2:
                both.wait()
            return super().sample(prompts, params, first)

    flights = [
        ShardsInFlight(files, PARAMS, Waiting(), text_of, Taker(number, take_over_seconds=1e9), Unwatched())
        for number in range(2)
    ]
    takers = [threading.Thread(target=flight.run) for flight in flights]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join(timeout=30)
    assert {files.report(shard).replica for shard in files.shards[:2]} == {0, 1}
    assert [one.id for one in files.read(SampledTexts)] == [one.id for one in REQUESTS]


def test_a_slow_replicas_shard_is_done_by_another(tmp_path: Path, whole: list[SampledTexts]) -> None:
    files = files_of(tmp_path, size=2)
    assert files.lease(files.shards[0], 9, 1e9), "replica 9 has begun, and is never heard of again"
    lease = files.folder / "shard_00000.lease"
    hour_ago = time.time() - 3600
    os.utime(lease, (hour_ago, hour_ago))
    ShardsInFlight(files, PARAMS, OneByOne(), text_of, Taker(0, 60, mixes_shards=True), Unwatched()).run()
    assert list(files.read(SampledTexts)) == whole
    assert files.report(files.shards[0]).replica == 0
