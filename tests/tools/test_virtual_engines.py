"""Virtual time: threads take turns by their clocks, and modelled engines keep the sampler's contract where they can."""

from collections.abc import Iterator
from functools import partial
from itertools import count

import pytest

from srlm_mega.gpus import find_gpu
from srlm_mega.sampling.sampler import Completion, Request, Sampler, SamplingParams
from srlm_mega.tools.planner.engine_model import EngineModel, OutputLengths
from srlm_mega.tools.planner.generation import Replica
from srlm_mega.tools.planner.shapes import PUBLISHED
from srlm_mega.tools.virtual_engines import ModelledSampler, VirtualClock

REPLICA = Replica(PUBLISHED["llama2-7b"], find_gpu("h100"), 1, fp8=False, fp8_cache=False, batch_limit=8)
PARAMS = SamplingParams(n=4, temperature=0.7, top_p=0.9, max_new_tokens=100, seed=3)


def modelled(clock: VirtualClock) -> ModelledSampler:
    return ModelledSampler(EngineModel(REPLICA, "MAX_UTILIZATION"), clock, {100: OutputLengths(30, 100, 0.8)})


def alone(clock: VirtualClock, requests: Iterator[Request]) -> dict[int, float]:
    """When each request was answered, by its position."""
    seconds = dict[int, float]()

    def work() -> None:
        for answer in modelled(clock).stream(requests):
            seconds[answer.request.position] = clock.now

    clock.run([work])
    return seconds


def test_threads_take_turns_by_their_clocks() -> None:
    """One sleeps 3 s at a time, one 2 s; at 6 s both are due, and the one that has waited longer is first."""
    seen: list[tuple[str, float]] = []

    def work(clock: VirtualClock, name: str, seconds: float, times: int) -> None:
        for _ in range(times):
            clock.sleep(seconds)
            seen.append((name, clock.now))

    clock = VirtualClock()
    clock.run([partial(work, clock, "three", 3.0, 2), partial(work, clock, "two", 2.0, 4)])
    assert seen == [("two", 2), ("three", 3), ("two", 4), ("three", 6), ("two", 6), ("two", 8)]
    clock.run([partial(work, clock, "one", 1.0, 1)])
    assert seen[-1] == ("one", 9), "the clock goes on"


def test_an_error_of_one_thread_ends_the_others() -> None:
    clock = VirtualClock()

    def fail() -> None:
        clock.sleep(5.0)
        raise OSError("the disk is full")

    def wait_for_ever() -> None:
        while True:
            clock.sleep(1.0)

    with pytest.raises(OSError, match="the disk is full"):
        clock.run([fail, wait_for_ever])
    with pytest.raises(RuntimeError, match="another thread"):
        clock.run([wait_for_ever])


def test_answers_come_as_they_finish_and_depend_on_the_seed_alone() -> None:
    clock, again = VirtualClock(), VirtualClock()
    sampler: Sampler = modelled(clock)
    answers: dict[int, tuple[Completion, ...]] = {}
    sampled: list[list[Completion]] = []

    def stream() -> None:
        for answer in sampler.stream(Request((0,) * 20, PARAMS, position) for position in range(40)):
            answers[answer.request.position] = answer.completions

    def sample() -> None:
        sampled.extend(modelled(again).sample([(0,) * 20], PARAMS, first=7))

    clock.run([stream])
    again.run([sample])
    assert sorted(answers) == list(range(40)) and list(answers) != sorted(answers)
    everything = [one for completions in answers.values() for one in completions]
    assert len({one.seed for one in everything}) == 160 == len(everything)
    assert all((len(one.token_ids) == 100) == (one.finish_reason == "length") for one in everything)
    assert sampled == [list(answers[7])]


def test_a_request_is_taken_when_there_is_room() -> None:
    """Eight sequences run and as many wait, since nothing is heard of copies that have ended: four requests."""
    clock, taken = VirtualClock(), list[float]()

    def requests() -> Iterator[Request]:
        for position in range(12):
            taken.append(clock.now)
            yield Request((0,) * 20, PARAMS, position)

    seconds = alone(clock, requests())
    assert taken[:4] == [0.0] * 4 and taken[4] == min(seconds.values()), "the fifth when the first is answered"
    assert sorted(taken) == taken and len(seconds) == 12


def test_the_engine_works_while_the_iterator_waits() -> None:
    """Two requests come 1,000 s late: the first ones have long been answered, and are not computed then."""
    clock = VirtualClock()

    def requests() -> Iterator[Request]:
        for position in count():
            if position == 2:
                clock.sleep(1000.0)
            if position == 4:
                return
            yield Request((0,) * 20, PARAMS, position)

    late = alone(clock, requests())
    prompt = alone(VirtualClock(), iter([Request((0,) * 20, PARAMS, position) for position in range(2)]))
    assert late[0] == late[1] == 1000.0, "the stream hears of them when the iterator gives the next"
    assert 1000.0 < max(late[2], late[3]) < 1000.0 + 2 * max(prompt.values())
