"""Second tries: what fails for a moment succeeds, what is poisoned is recorded, and seeds stay what they were."""

from collections.abc import Iterator, Sequence

import pytest

from srlm_mega.errors import CannotContinue
from srlm_mega.records import FailedRequest
from srlm_mega.sampling.retries import RetryingSampler
from srlm_mega.sampling.sampler import Answer, Completion, Request, SamplingParams
from srlm_mega.seeds import derive_seed

PARAMS = SamplingParams(n=2, temperature=1.0, top_p=1.0, max_new_tokens=4, seed=11)
PROMPTS = [(number,) for number in range(6)]
IDS = [f"p{number}" for number in range(6)]


class Fragile:
    """Raises `errors` at its first calls, and for poisoned prompts always."""

    def __init__(self, *errors: Exception, poisoned: Sequence[int] = ()) -> None:
        self.errors = list(errors)
        self.poisoned = poisoned
        self.calls: list[int] = []

    def sample(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, first: int = 0
    ) -> list[list[Completion]]:
        self.calls.append(len(prompts))
        if self.errors:
            raise self.errors.pop(0)
        if any(prompt[0] in self.poisoned for prompt in prompts):
            raise RuntimeError("cuda error")
        seeds = [derive_seed(params.seed, first + place) for place in range(len(prompts))]
        return [[Completion((seed,), "length", seed)] * params.n for seed in seeds]

    def stream(self, requests: Iterator[Request]) -> Iterator[Answer]:
        """All of them in one call."""
        asked = list(requests)
        prompts = [request.prompt for request in asked]
        answers = self.sample(prompts, asked[0].params, asked[0].position)
        return (Answer(request, tuple(answer)) for request, answer in zip(asked, answers, strict=True))

    def close(self) -> None:
        """Nothing to free."""


def patient(sampler: Fragile, allowed: int = 0) -> tuple[RetryingSampler, list[float]]:
    waits: list[float] = []
    return RetryingSampler(sampler, 3, allowed, sleep=waits.append), waits


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ConnectionError("reset"), TimeoutError()])
def test_a_passing_error_costs_a_wait_that_grows(error: Exception) -> None:
    fragile = Fragile(error, error)
    sampler, waits = patient(fragile)
    assert sampler.sample(IDS, PROMPTS, PARAMS) == Fragile().sample(PROMPTS, PARAMS)
    assert fragile.calls == [6, 6, 6] and waits == [1.0, 2.0]


def test_a_poisoned_request_costs_only_itself() -> None:
    fragile = Fragile(poisoned=[4])
    answers = patient(fragile, allowed=1)[0].sample(IDS, PROMPTS, PARAMS)
    whole = Fragile().sample(PROMPTS, PARAMS)
    assert [answer for place, answer in enumerate(answers) if place != 4] == whole[:4] + whole[5:]
    assert answers[4] == FailedRequest("p4", "RuntimeError('cuda error')", 3)
    assert fragile.calls == [6] * 3 + [1] * 4 + [1] * 3 + [1]


def test_more_failures_than_allowed_stop_the_run() -> None:
    sampler, _ = patient(Fragile(poisoned=[1, 4]), allowed=1)
    with pytest.raises(CannotContinue, match=r"2 requests failed for good, .* allows 1\. The last is p4: .*cuda error"):
        sampler.sample(IDS, PROMPTS, PARAMS)
    sampler, _ = patient(Fragile(poisoned=[1]), allowed=1)
    assert isinstance(sampler.sample(IDS, PROMPTS, PARAMS)[1], FailedRequest)
    with pytest.raises(CannotContinue):  # all calls together
        sampler.sample(IDS, PROMPTS, PARAMS)


def test_a_mistake_is_not_tried_again() -> None:
    fragile = Fragile(ValueError("prompt 0 has no tokens"))
    with pytest.raises(ValueError, match="no tokens"):
        patient(fragile)[0].sample(IDS, PROMPTS, PARAMS)
    assert fragile.calls == [6]
