"""What the judgements of a candidate say, as numbers: read beside the candidates, by a process of its own where a round
is large."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from srlm_mega.judging.prefetch import prefetch
from srlm_mega.judging.scores import mean_score, score_variance
from srlm_mega.records import Judgement, JudgementScore, read_jsonl

WORTH_A_PROCESS = 64 * 1024**2  # bytes of judgements: fewer are read before another process has started


class Reward(NamedTuple):
    """One candidate's. `scores`: None where none could be read. `mean`: of those that could, None with too few.
    `variance`: None with fewer than two."""

    candidate_id: str
    scores: tuple[float | None, ...] = ()
    mean: float | None = None
    variance: float | None = None


def reward_of(candidate_id: str, judgements: Sequence[Judgement | JudgementScore], min_valid: int) -> Reward:
    """Of all judgements of a candidate; the mean needs `min_valid` that could be read. ValueError when one occurs
    twice."""
    if len({judgement.id for judgement in judgements}) < len(judgements):
        raise ValueError(f"a judgement of candidate {candidate_id} occurs twice")
    scores = tuple(judgement.score for judgement in judgements)
    return Reward(candidate_id, scores, mean_score(scores, min_valid), score_variance(scores))


def rewards_of(judgements: Iterable[Judgement | JudgementScore], min_valid: int) -> Iterator[Reward]:
    """Of judgements that stand together by candidate, in their order."""
    for candidate_id, group in groupby(judgements, attrgetter("candidate_id")):
        yield reward_of(candidate_id, list(group), min_valid)


def read_rewards(path: Path, min_valid: int, worth_a_process: int = WORTH_A_PROCESS) -> Iterator[Reward]:
    """Of a file of judgements: parsing millions of them is as much work as everything that pairs need besides."""
    if path.stat().st_size < worth_a_process:
        return rewards_in(path, min_valid)
    return prefetch(rewards_in, path, min_valid)


def rewards_in(path: Path, min_valid: int) -> Iterator[Reward]:
    """Of a file of judgements, in this process."""
    return rewards_of(read_jsonl(path, JudgementScore), min_valid)
