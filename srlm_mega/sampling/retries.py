"""Retries: a batch that fails for a transient reason is sent again, and after the last attempt each of its requests is
sent alone, so that one bad request does not cost the others their answers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.records import FailedRequest
from srlm_mega.sampling.backends import open_sampler
from srlm_mega.sampling.sampler import Completion, Request, Sampler, SamplingParams
from srlm_mega.sampling.shards import too_many_failed

# Backends raise these when an engine, a device or a connection fails. A ValueError would only be raised again.
TRANSIENT = (RuntimeError, OSError)
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
Answer = list[Completion] | FailedRequest


@dataclass
class RetryingSampler:
    """A sampler with retries. It tolerates `allowed` requests that fail in all `attempts`, in all calls together."""

    sampler: Sampler
    attempts: int
    allowed: int
    sleep: Callable[[float], None] = time.sleep
    failed: list[FailedRequest] = field(default_factory=list, init=False)

    def sample(
        self,
        ids: Sequence[str],
        prompts: Sequence[tuple[int, ...]],
        params: SamplingParams,
        on_answered: Callable[[int], object] = int,
    ) -> list[Answer]:
        """Return for each prompt its completions, or the FailedRequest with its id; `Sampler.sample` describes prompts
        and params. `on_answered` gets the number of answers so far. CannotContinue when more than `allowed` requests
        have failed."""
        try:
            return list(self._retrying()(self._together, prompts, params, on_answered))
        except TRANSIENT as error:
            print(f"a batch of {len(prompts)} requests failed, each is now sent alone: {error!r}", flush=True)
        return [self._alone(*request, params) for request in zip(ids, prompts, range(len(prompts)), strict=True)]

    def close(self) -> None:
        """Free the model."""
        self.sampler.close()

    def _together(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, on_answered: Callable[[int], object]
    ) -> list[list[Completion]]:
        answers: dict[int, list[Completion]] = {}
        requests = (Request(prompt, params, position) for position, prompt in enumerate(prompts))
        for answer in self.sampler.stream(requests):
            if answer.error:
                raise RuntimeError(answer.error)
            answers[answer.request.position] = list(answer.completions)
            on_answered(len(answers))
        return [answers[position] for position in range(len(prompts))]

    def _alone(self, request_id: str, prompt: tuple[int, ...], position: int, params: SamplingParams) -> Answer:
        try:
            (completions,) = self._retrying()(self.sampler.sample, [prompt], params, position)
            return completions
        except TRANSIENT as error:
            self.failed.append(FailedRequest(request_id, repr(error), self.attempts))
            if len(self.failed) > self.allowed:
                raise too_many_failed(self.failed, self.allowed) from error
            return self.failed[-1]

    def _retrying(self) -> Retrying:
        return Retrying(
            stop=stop_after_attempt(self.attempts),
            wait=wait_exponential(multiplier=FIRST_WAIT_SECONDS, max=LONGEST_WAIT_SECONDS),
            retry=retry_if_exception_type(TRANSIENT),
            sleep=self.sleep,
            reraise=True,
        )


def none_failed(answers: Sequence[Answer]) -> list[list[Completion]]:
    """Return the answers of a sampler with allowed=0 as completions. AssertionError when a request failed."""
    completions = [answer for answer in answers if not isinstance(answer, FailedRequest)]
    assert len(completions) == len(answers), "allowed=0 lets no failed request through"
    return completions


def open_retrying_sampler(
    config: SamplerConfig, model_folder: Path, end_ids: tuple[int, ...], allowed: int
) -> RetryingSampler:
    """Load a model as `open_sampler` does, with the configured number of attempts; `allowed` requests may fail."""
    return RetryingSampler(open_sampler(config, model_folder, end_ids), config.attempts, allowed)
