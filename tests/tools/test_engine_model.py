"""The engine model: against a twin that takes every step, by hand, and at its limits."""

from dataclasses import dataclass, replace
from math import inf
from random import Random
from statistics import mean

import pytest

from srlm_mega.gpus import find_gpu
from srlm_mega.tools.planner import engine_model
from srlm_mega.tools.planner.engine_model import (
    EngineModel,
    EngineRequest,
    OutputLengths,
    SchedulerPolicy,
    share_seconds,
)
from srlm_mega.tools.planner.generation import Replica
from srlm_mega.tools.planner.shapes import PUBLISHED

# One H100 holds about 113,000 tokens beside Llama 2 7B.
LLAMA = Replica(PUBLISHED["llama2-7b"], find_gpu("h100"), 1, fp8=False, fp8_cache=False)
POLICIES: tuple[SchedulerPolicy, ...] = ("GUARANTEED_NO_EVICT", "MAX_UTILIZATION")


def small(batch_limit: int = 2048, cache_tokens: int = 10**9) -> Replica:
    """With room for so many sequences and tokens."""
    fraction = min(1.0, cache_tokens / LLAMA.cache_tokens * LLAMA.cache_fraction)
    return replace(LLAMA, batch_limit=batch_limit, cache_fraction=fraction)


def finish(engine: EngineModel) -> dict[int, float]:
    """The second at which each request was whole."""
    seconds = {}
    while engine.busy:
        seconds |= {request.key: engine.now for request in engine.advance()}
    return seconds


@dataclass
class Row:
    """A sequence of the twin."""

    request: EngineRequest
    output: int
    sampled: int = 0
    computed: bool = True  # its context is in the cache, or its prompt will be by an earlier copy's prefill

    @property
    def context(self) -> int:
        return self.request.prompt + self.sampled


def every_step(
    requests: list[EngineRequest], replica: Replica, policy: SchedulerPolicy
) -> tuple[dict[int, float], int]:
    """The twin: a token at a time. Returns when requests were whole, and the number of pauses."""
    waiting = [Row(one, output, computed=copy > 0) for one in requests for copy, output in enumerate(one.outputs)]
    running: list[Row] = []
    left = {one.key: len(one.outputs) for one in requests}
    seconds, now, pauses = dict[int, float](), 0.0, 0
    reserves = policy == "GUARANTEED_NO_EVICT"
    while waiting or running:
        while waiting and len(running) < replica.batch_limit:
            if reserves:
                needs = sum(row.request.prompt + row.request.max_tokens for row in [*running, waiting[0]])
            else:
                needs = sum(row.context + 1 for row in [*running, waiting[0]])
            if needs > replica.cache_tokens:
                break
            row = waiting.pop(0)
            now += 0.0 if row.computed else replica.prefill_seconds(row.context)
            row.computed = True
            running.append(row)
        while not reserves and sum(row.context + 1 for row in running) > replica.cache_tokens:
            running[-1].computed = False
            waiting.insert(0, running.pop())
            pauses += 1
        now += replica.decode_seconds(len(running), mean(row.context for row in running))
        for row in running:
            row.sampled += 1
        for row in [row for row in running if row.sampled == row.output]:
            running.remove(row)
            left[row.request.key] -= 1
            if not left[row.request.key]:
                seconds[row.request.key] = now
    return seconds, pauses


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("batch_limit", "cache_tokens"), [(7, 10**9), (2048, 1500), (12, 2500)])
def test_jumps_give_what_single_steps_give(policy: SchedulerPolicy, batch_limit: int, cache_tokens: int) -> None:
    rng = Random(1)
    requests = [
        EngineRequest(key, rng.randint(1, 300), [rng.randint(1, 90) for _ in range(rng.randint(1, 4))], 100)
        for key in range(40)
    ]
    replica = small(batch_limit, cache_tokens)
    engine = EngineModel(replica, policy)
    for request in requests:
        engine.submit(request)
    seconds, pauses = every_step(requests, replica, policy)
    assert finish(engine) == pytest.approx(seconds)
    assert engine.pauses == pauses
    assert (pauses > 0) == (policy == "MAX_UTILIZATION" and cache_tokens < 10**9), "the case of a full cache is there"
    assert engine.sampled == sum(sum(request.outputs) for request in requests)


def test_a_request_by_hand() -> None:
    """A prefill of 100 tokens for both copies; a step for two, then one for the longer copy alone."""
    engine = EngineModel(LLAMA, "MAX_UTILIZATION", now=5.0)
    engine.submit(EngineRequest(3, 100, (1, 2), 8))
    assert engine.advance() == [] and engine.busy
    (whole,) = engine.advance()
    steps = LLAMA.decode_seconds(2, 100) + LLAMA.decode_seconds(1, 101)
    assert whole.key == 3 and not engine.busy
    assert engine.now == pytest.approx(5.0 + LLAMA.prefill_seconds(100) + steps)


def test_reserving_admits_fewer_than_using() -> None:
    """A cache of 1000 tokens: room for three of 100 + 200, or for all nine of 100 and what they have sampled so far."""
    waiting = {}
    for policy in POLICIES:
        engine = EngineModel(small(cache_tokens=1000), policy)
        for key in range(9):
            engine.submit(EngineRequest(key, 100, (5,), 200))
        engine.advance(until=1e-9)
        waiting[policy] = engine.waiting
    assert waiting == {"GUARANTEED_NO_EVICT": 6, "MAX_UTILIZATION": 0}


@pytest.mark.parametrize("policy", POLICIES)
def test_time_goes_on_step_by_step_and_later_requests_join(policy: SchedulerPolicy) -> None:
    engine = EngineModel(LLAMA, policy)
    assert engine.advance(until=4.0) == [] and engine.now == 4.0, "an idle engine waits"
    engine.submit(EngineRequest(1, 10, (1000,), 1000))
    assert engine.advance(until=5.0) == []
    assert 5.0 <= engine.now < 5.0 + LLAMA.decode_seconds(1, 1010)
    joined = engine.now
    engine.submit(EngineRequest(2, 10, (1,), 1000))
    assert [request.key for request in engine.advance()] == [2]
    assert engine.now - joined < 2 * LLAMA.decode_seconds(2, 1010) + LLAMA.prefill_seconds(10)
    assert [request.key for request in engine.advance()] == [1]


def test_what_the_cache_can_never_hold_is_refused() -> None:
    replica = small(cache_tokens=1000)
    with pytest.raises(ValueError, match="a sequence of 1100 tokens, and the cache holds 1000"):
        EngineModel(replica, "GUARANTEED_NO_EVICT").submit(EngineRequest(1, 100, (10,), 1000))
    EngineModel(replica, "MAX_UTILIZATION").submit(EngineRequest(1, 100, (10,), 1000))
    assert share_seconds(replica, "MAX_UTILIZATION", 1, 100, 1, OutputLengths(10, 1000, 0.8)) == inf


@pytest.mark.parametrize(("average", "cap"), [(450, 2048), (140, 512), (480, 512), (350, 10**6)])
def test_lengths_have_their_mean_after_the_cut(average: int, cap: int) -> None:
    lengths = OutputLengths(average, cap, 0.8).evenly(20_000, seed=1)
    assert mean(lengths) == pytest.approx(average, rel=5e-3)
    assert max(lengths) <= cap and min(lengths) >= 1 and len(set(lengths)) > 100


def test_lengths_are_seeded_and_may_be_all_equal() -> None:
    lengths = OutputLengths(450, 2048, 0.8)
    assert lengths.evenly(50, 1) == lengths.evenly(50, 1) != lengths.evenly(50, 2)
    assert sorted(lengths.evenly(50, 1)) == sorted(lengths.evenly(50, 2))
    assert OutputLengths(70, 2048, 0.0).evenly(3, 1) == [70, 70, 70]
    assert OutputLengths(70, 64, 0.8).evenly(3, 1) == [64, 64, 64], "a mean above the cap is the cap"


def test_a_long_queue_goes_on_at_the_pace_of_the_full_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = OutputLengths(60, 300, 0.8)
    whole = share_seconds(LLAMA, "MAX_UTILIZATION", 6000, 100, 3, lengths)
    monkeypatch.setattr(engine_model, "MODELLED", 9000)
    assert share_seconds(LLAMA, "MAX_UTILIZATION", 6000, 100, 3, lengths) == pytest.approx(whole, rel=0.02)


def test_the_time_of_a_queue_lies_between_two_bounds() -> None:
    """Not faster than a batch that is always full with outputs of mean length. Not slower than all tokens by full
    batches (a context of 120 and half the output, which long outputs have more often) and one longest output."""
    lengths, replica = OutputLengths(450, 2048, 0.8), small(batch_limit=64)
    outputs = lengths.evenly(1280, seed=0)
    context = 120 + sum(output**2 for output in outputs) / sum(outputs) / 2
    prefills, straggler = 320 * replica.prefill_seconds(120), 2048 * replica.decode_seconds(64, 120 + 1024)
    seconds = share_seconds(replica, "MAX_UTILIZATION", 320, 120, 4, lengths)
    assert replica.seconds(320, 120, 120, 4, 450) < seconds
    assert seconds < prefills + sum(outputs) / 64 * replica.decode_seconds(64, context) + straggler
    two_batches = share_seconds(replica, "MAX_UTILIZATION", 32, 120, 4, lengths)
    assert two_batches > 1.5 * replica.seconds(32, 120, 120, 4, 450), "stragglers decide"
