"""Candidates joined with their rewards, prompt by prompt: the files are read in parallel, none is held in memory."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Generic, Literal, TypeVar

from srlm_mega.judging.rewards import Reward
from srlm_mega.records import Candidate, Judgement

CandidateState = Literal["scored", "truncated", "unscored"]
T = TypeVar("T")
J = TypeVar("J", Judgement, Reward)


@dataclass(frozen=True, slots=True)
class ScoredCandidate:
    """A candidate with its reward. `score` is None unless `state` is `scored`. `scores` are those of its judgements,
    None for an unparsed one; `variance` is theirs, None with fewer than two. `earlier` is the mean score by the
    previous model."""

    candidate: Candidate
    state: CandidateState
    score: float | None
    scores: tuple[float | None, ...]
    variance: float | None
    earlier: float | None


class MergeJoin(Generic[T]):
    """Merge join of grouped records with keys in the same order: some keys may have no group, no group may lack a key.

    `origin` names the records in an error.
    """

    def __init__(self, records: Iterable[T], key: Callable[[T], str], origin: str) -> None:
        self._groups = groupby(records, key)
        self._origin = origin
        self._advance()

    def take(self, key: str) -> list[T]:
        """Return the group of the next key, empty when it has none."""
        if self._key != key:
            return []
        found = self._group
        self._advance()
        return found

    def finish(self) -> None:
        """Raise ValueError when a group was not taken."""
        if self._key is not None:
            raise ValueError(
                f"{self._origin} {self._key} is unknown, occurs twice or is out of order: make both files again"
            )

    def _advance(self) -> None:
        key, group = next(self._groups, (None, iter(())))
        self._key: str | None = key
        self._group: list[T] = list(group)


def judgements_by_candidate(judgements: Iterable[J]) -> MergeJoin[J]:
    """Return judgements, or rewards, to be joined with candidates."""
    return MergeJoin(judgements, attrgetter("candidate_id"), "a judgement of candidate")


def scored_prompts(
    candidates: Iterable[Candidate], rewards: Iterable[Reward], earlier: Iterable[Reward] = ()
) -> Iterator[list[ScoredCandidate]]:
    """Yield the candidates of each prompt with their rewards. All inputs are in the candidates' order; a candidate may
    have no reward. `earlier` are the previous model's rewards of the same candidates.

    Raise ValueError when a reward belongs to no candidate, or something occurs twice.
    """
    own, previous = judgements_by_candidate(rewards), judgements_by_candidate(earlier)
    seen: set[str] = set()
    for prompt_id, group in groupby(candidates, attrgetter("prompt_id")):
        members = list(group)
        if prompt_id in seen or len({candidate.id for candidate in members}) < len(members):
            raise ValueError(f"a candidate of prompt {prompt_id} occurs twice, or the prompt's are not in one block")
        seen.add(prompt_id)
        yield [
            score_candidate(candidate, only(own.take(candidate.id)), only(previous.take(candidate.id)))
            for candidate in members
        ]
    own.finish()
    previous.finish()


def only(rewards: list[Reward]) -> Reward | None:
    """Return a candidate's only reward, None when it has none."""
    return rewards[0] if rewards else None


def score_candidate(candidate: Candidate, reward: Reward | None, earlier: Reward | None = None) -> ScoredCandidate:
    """Return a candidate with its reward, or with the state that says why it has none."""
    reward = reward or Reward(candidate.id)
    score = reward.mean
    state: CandidateState = "scored"
    if candidate.finish_reason == "length":
        state, score = "truncated", None
    elif score is None:
        state = "unscored"
    before = None if earlier is None else earlier.mean
    return ScoredCandidate(candidate, state, score, reward.scores, reward.variance, before)
