"""Second tries: a batch that fails for a passing reason is sent again, and then each of its requests alone, so that one
poisoned request does not cost the others their answers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.records import FailedRequest
from srlm_mega.sampling.backends import open_sampler
from srlm_mega.sampling.sampler import Completion, Sampler, SamplingParams
from srlm_mega.sampling.shards import too_many_failed

# What backends raise when an engine, a device or a connection fails. A ValueError is a mistake that stays one.
TRANSIENT = (RuntimeError, OSError)
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
Answer = list[Completion] | FailedRequest


@dataclass
class PatientSampler:
    """A sampler with retries. It tolerates `allowed` requests that fail for good, in all its calls together."""

    sampler: Sampler
    attempts: int
    allowed: int
    sleep: Callable[[float], None] = time.sleep
    failed: list[FailedRequest] = field(default_factory=list, init=False)

    def sample(self, ids: Sequence[str], prompts: Sequence[tuple[int, ...]], params: SamplingParams) -> list[Answer]:
        """The completions of each prompt, or (`ids` name the requests) its failure. CannotContinue above the share."""
        try:
            return list(self._retrying()(self.sampler.sample, prompts, params))
        except TRANSIENT as error:
            print(f"a batch of {len(prompts)} requests failed, each goes alone: {error!r}", flush=True)
        return [self._alone(*named, place, params) for place, named in enumerate(zip(ids, prompts, strict=True))]

    def close(self) -> None:
        """Free the model."""
        self.sampler.close()

    def _alone(self, name: str, prompt: tuple[int, ...], place: int, params: SamplingParams) -> Answer:
        try:
            (completions,) = self._retrying()(self.sampler.sample, [prompt], params, place)
            return completions
        except TRANSIENT as error:
            self.failed.append(FailedRequest(name, repr(error), self.attempts))
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
    """The answers of a sampler that tolerates no failure."""
    completions = [answer for answer in answers if not isinstance(answer, FailedRequest)]
    assert len(completions) == len(answers), "allowed=0 lets no failed request through"
    return completions


def open_patient_sampler(config: SamplerConfig, model_folder: Path, eos_id: int, allowed: int) -> PatientSampler:
    """The configured backend with the model loaded, and the configured number of attempts."""
    return PatientSampler(open_sampler(config, model_folder, eos_id), config.attempts, allowed)
