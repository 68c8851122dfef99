"""What a judge of two responses is: questions in shards, verdicts out. judges.py chooses one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from srlm_mega.judging.pairwise import parse_verdict
from srlm_mega.records import PairwiseJudgement
from srlm_mega.sampling.shards import Answered, Shard
from srlm_mega.stages.sampling_task import CompletionFields


@dataclass(frozen=True)
class PairwiseQuestion:
    """Two responses to a prompt in one order, as the judge is asked about them."""

    prompt_id: str
    ours_first: bool
    text: str


def judgement_of(question: PairwiseQuestion, fields: CompletionFields) -> PairwiseJudgement:
    """The record of a judge's answer, with the verdict in it."""
    return PairwiseJudgement(
        prompt_id=question.prompt_id,
        ours_first=question.ours_first,
        verdict=parse_verdict(fields["text"]),
        **fields,
    )


class PairwiseJudge(Protocol):
    """A judge that is ready."""

    @property
    def name(self) -> str:
        """What the records call it."""

    @property
    def shard_size(self) -> int:
        """Questions that are asked together, and lost together by a kill."""

    def fits(self, text: str) -> bool:
        """Whether a question leaves room for a whole answer."""

    def answer(self, shard: Shard[PairwiseQuestion]) -> Answered:
        """A PairwiseJudgement per question; those that failed for good are named instead. CannotContinue when too many
        did."""

    def close(self) -> None:
        """Free what it holds."""


OpenJudge = Callable[[int], PairwiseJudge]
"""Gets a judge ready for so many questions."""
