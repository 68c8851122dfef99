"""Samplers for tests: what they answer is written in `sample` alone."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from srlm_mega.sampling.sampler import Answer, Completion, Request, SamplingParams


class OneCallSampler:
    """A `Sampler` that answers each run of requests with the same params by one call of `sample`, which is given by the
    class under it."""

    def sample(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, first: int = 0
    ) -> list[list[Completion]]:
        raise NotImplementedError

    def stream(self, requests: Iterator[Request]) -> Iterator[Answer]:
        for params, group in groupby(requests, lambda request: request.params):
            asked = list(group)
            answers = self.sample([request.prompt for request in asked], params, asked[0].position)
            yield from (Answer(request, tuple(answer)) for request, answer in zip(asked, answers, strict=True))

    def close(self) -> None:
        """Nothing to free."""
