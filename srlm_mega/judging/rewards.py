"""Rewards of candidates, from their judgements; read by a process of its own in a large round."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from srlm_mega.judging.prefetch import prefetch
from srlm_mega.judging.scores import mean_score, score_variance
from srlm_mega.records import Judgement, JudgementScore, read_jsonl

WORTH_A_PROCESS = 64 * 1024**2  # bytes of judgements: smaller files are read before another process has started


class Reward(NamedTuple):
    """Reward of one candidate. `scores` are those of its judgements, None for an unparsed one. `mean` is over the
    parsed ones, None with too few of them; `variance` is theirs, None with fewer than two."""

    candidate_id: str
    scores: tuple[float | None, ...] = ()
    mean: float | None = None
    variance: float | None = None


def reward_of(candidate_id: str, judgements: Sequence[Judgement | JudgementScore], min_valid: int) -> Reward:
    """Return the reward from all judgements of a candidate; the mean needs `min_valid` parsed scores. Raise ValueError
    when a judgement occurs twice."""
    if len({judgement.id for judgement in judgements}) < len(judgements):
        raise ValueError(f"a judgement of candidate {candidate_id} occurs twice")
    scores = tuple(judgement.score for judgement in judgements)
    return Reward(candidate_id, scores, mean_score(scores, min_valid), score_variance(scores))


def rewards_of(judgements: Iterable[Judgement | JudgementScore], min_valid: int) -> Iterator[Reward]:
    """Yield the rewards of judgements that are grouped by candidate, in their order."""
    for candidate_id, group in groupby(judgements, attrgetter("candidate_id")):
        yield reward_of(candidate_id, list(group), min_valid)


def read_rewards(path: Path, min_valid: int, worth_a_process: int = WORTH_A_PROCESS) -> Iterator[Reward]:
    """Yield the rewards of a file of judgements, from another process if the file is large: parsing millions of lines
    takes as long as the rest of making pairs."""
    if path.stat().st_size < worth_a_process:
        return rewards_in(path, min_valid)
    return prefetch(rewards_in, path, min_valid)


def rewards_in(path: Path, min_valid: int) -> Iterator[Reward]:
    """Yield the rewards of a file of judgements, in this process."""
    return rewards_of(read_jsonl(path, JudgementScore), min_valid)
