"""The interface of pairwise judges: questions in, verdicts out. judges.py opens the configured one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from srlm_mega.judging.verdicts import verdict_of
from srlm_mega.records import PairwiseJudgement
from srlm_mega.sampling.sampling_rate import ProgressCallback
from srlm_mega.stages.sampling_task import CompletionFields


@dataclass(frozen=True)
class PairwiseQuestion:
    """A question about two responses to a prompt: the judge's prompt as text, and which of them it shows first."""

    prompt_id: str
    ours_first: bool
    text: str


def judgement_of(question: PairwiseQuestion, fields: CompletionFields) -> PairwiseJudgement:
    """Return the record of a judge's answer, with the verdict that is read from its text."""
    return PairwiseJudgement(
        prompt_id=question.prompt_id,
        ours_first=question.ours_first,
        verdict=verdict_of(fields["text"], fields["finish_reason"]),
        **fields,
    )


class PairwiseJudge(Protocol):
    """A judge that is ready to compare two responses."""

    @property
    def name(self) -> str:
        """The judge's name in records."""

    def fits(self, text: str) -> bool:
        """Return True when a question leaves room for a whole answer."""

    def judge(self, questions: Sequence[PairwiseQuestion], file: Path, on_progress: ProgressCallback) -> None:
        """Write a PairwiseJudgement per question to `file`, by way of shards that survive a kill, but for questions
        that failed. CannotContinue when too many have failed."""

    def close(self) -> None:
        """Free the model or the connection."""


OpenJudge = Callable[[int], PairwiseJudge]
"""Function that opens a judge for a number of questions."""
