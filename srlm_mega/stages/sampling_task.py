"""Sampling tasks, for all stages that sample in shards: requests to a model, and records of its completions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypedDict, TypeVar

from srlm_mega.chat import Chat
from srlm_mega.config import Config
from srlm_mega.judging.scores import MAX_SCORE, score_of
from srlm_mega.judging.template import JudgeTemplate
from srlm_mega.records import (
    Candidate,
    Decoding,
    FinishReason,
    Judgement,
    MetaJudgement,
    PairwiseJudgement,
    Prompt,
    SampledText,
)
from srlm_mega.sampling.sampler import SamplingParams
from srlm_mega.stages.work import Work

T = TypeVar("T")
Sampled = Candidate | Judgement | MetaJudgement | PairwiseJudgement


@dataclass(frozen=True)
class SamplingRequest(Generic[T]):
    """A prompt for the sampler. `source`: the object that its records are about; `id` names the request if it fails."""

    id: str
    source: T
    token_ids: tuple[int, ...]


Records = Callable[[SamplingRequest[T], Sequence[SampledText]], Iterator[Sampled]]
"""Function that turns a request and its completions into records."""


@dataclass(frozen=True)
class SamplingTask(Generic[T]):
    """A stage's sampling: the model's name in the run, the requests, the decoding settings (each shard sets its own
    seed), the function that makes records, and the output's file name. `unit`: the requests' name in progress."""

    model: str
    requests: Sequence[SamplingRequest[T]]
    params: SamplingParams
    records: Records[T]
    file: str
    unit: str

    def fitting(self, config: Config) -> tuple["SamplingTask[T]", int]:
        """Return the task without requests that leave no room for a whole answer, and their number."""
        kept = fitting_requests(config, self.requests, self.params.max_new_tokens)
        return replace(self, requests=kept), len(self.requests) - len(kept)


class CompletionFields(TypedDict):
    """Fields that every record of a completion has; a candidate keeps `cumulative_logprob` in addition."""

    text: str
    finish_reason: FinishReason
    seed: int
    model_hash: str
    token_ids: tuple[int, ...]
    decoding: Decoding


@dataclass(frozen=True)
class SampledBy:
    """The model that samples completions, as their records name it, its decoding settings, and the largest score that a
    judgement can have."""

    chat: Chat
    model_hash: str
    params: SamplingParams
    max_score: float = MAX_SCORE

    @classmethod
    def of_run(cls, work: Work, model: str, params: SamplingParams) -> "SampledBy":
        """Return the entry for a model of the stage's run."""
        chat = Chat.from_folder(work.run.weights(model))
        return cls(chat, work.run.digest(model), params, work.config.judge.max_score)

    def fields(self, completion: SampledText) -> CompletionFields:
        """Return a completion's record fields."""
        return {
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "seed": completion.seed,
            "model_hash": self.model_hash,
            "token_ids": completion.token_ids,
            "decoding": self.params.decoding,
        }


def report_progress(work: Work, unit: str, done: int, total: int, note: str) -> None:
    """Write the stage's progress file: `done` of `total` units, and a note of a few words."""
    work.progress.update(done, total, unit, note)


def judge_template(work: Work) -> JudgeTemplate:
    """Read the template of the additive judge that the run has kept."""
    kept = work.run.rubric_in_force
    assert kept is not None, f"{work.stage.name} begins after seed, which keeps a template"
    return JudgeTemplate.from_bytes(kept, "that the run has kept")


def candidates_of(
    by: SampledBy, letter: str, request: SamplingRequest[Prompt], completions: Sequence[SampledText]
) -> Iterator[Candidate]:
    """Yield the responses to one prompt, whose id is the request's."""
    for number, completion in enumerate(completions):
        yield Candidate(
            id=f"{request.id}-{letter}{number}",
            prompt_id=request.id,
            prompt=request.source.text,
            system=request.source.system,
            prompt_token_ids=request.token_ids,
            cumulative_logprob=completion.cumulative_logprob,
            **by.fields(completion),
        )


def judgements_of(
    by: SampledBy, letter: str, request: SamplingRequest[T], completions: Sequence[SampledText]
) -> Iterator[Judgement]:
    """Yield the judgements of one response, whose id is the request's."""
    for number, completion in enumerate(completions):
        fields = by.fields(completion)
        yield Judgement(
            id=f"{request.id}-{letter}{number}",
            candidate_id=request.id,
            score=score_of(fields["text"], fields["finish_reason"], by.max_score),
            **fields,
        )


def fitting_requests(
    config: Config, requests: Sequence[SamplingRequest[T]], max_new_tokens: int
) -> list[SamplingRequest[T]]:
    """Return the requests that leave room for a whole answer; the others are never sent and never cut."""
    longest = config.longest_prompt(max_new_tokens)
    return [request for request in requests if len(request.token_ids) <= longest]
