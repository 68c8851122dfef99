"""The meta-judge (Meta-Rewarding, arXiv 2407.19594): a model compares its own judgements of one response, in both
orders; the best and the worst by Elo become a pair that trains the judge."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from srlm_mega.judging.scored_candidates import ScoredCandidate
from srlm_mega.judging.template import Template
from srlm_mega.records import Candidate, Judgement, MetaJudgement

PRIOR_WINS = 0.1  # of each judgement over each other: ratings stay finite when one wins every comparison
ITERATIONS = 200
ELO_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Contest:
    """One response, its judgements that can be compared, and the variance of their scores."""

    candidate: Candidate
    judgements: tuple[Judgement, ...]
    variance: float


@dataclass(frozen=True)
class PositionWeights:
    """Weights of a win by position in the prompt: the position that wins more often counts less."""

    first: float
    second: float


def meta_template() -> Template:
    """Return the shipped template; its placeholders are `instruction`, `response`, `first` and `second`."""
    path = Path(__file__).with_name("meta.txt")
    return Template.from_text(
        path.read_text(encoding="utf-8").rstrip("\n"), str(path), ("instruction", "response", "first", "second")
    )


def contest_of(group: Sequence[tuple[ScoredCandidate, Sequence[Judgement]]]) -> Contest | None:
    """Return the response of a prompt whose scores vary most, with its judgements that were not truncated and have a
    score. None when no response has two of them with different scores."""
    found: Contest | None = None
    for item, judgements in group:
        usable = tuple(one for one in judgements if one.score is not None and one.finish_reason == "stop")
        variance = item.variance or 0.0
        if len({one.score for one in usable}) > 1 and (found is None or variance > found.variance):
            found = Contest(item.candidate, usable, variance)
    return found


def comparisons(contest: Contest) -> list[tuple[Judgement, Judgement]]:
    """Return all pairs of a response's judgements, each in both orders."""
    return list(permutations(contest.judgements, 2))


def position_weights(judged: Iterable[MetaJudgement]) -> PositionWeights:
    """Estimate the weights from all of a round's comparisons; 1/2 each when there is no win."""
    verdicts = [one.verdict for one in judged]
    first, second = verdicts.count("first"), verdicts.count("second")
    if first + second == 0:
        return PositionWeights(0.5, 0.5)
    return PositionWeights(second / (first + second), first / (first + second))


def elo(ids: Sequence[str], judged: Iterable[MetaJudgement], weights: PositionWeights) -> dict[str, float]:
    """Return Elo ratings with mean 0 by id, of maximum likelihood (Bradley-Terry, minorise-maximise)."""
    wins = dict.fromkeys(permutations(ids, 2), PRIOR_WINS)
    for one in judged:
        match one.verdict:
            case "first":
                wins[one.first_id, one.second_id] += weights.first
            case "second":
                wins[one.second_id, one.first_id] += weights.second
    strength = dict.fromkeys(ids, 1.0)
    for _ in range(ITERATIONS):
        strength = {
            own: sum(wins[own, other] for other in ids if other != own)
            / sum(
                (wins[own, other] + wins[other, own]) / (strength[own] + strength[other])
                for other in ids
                if other != own
            )
            for own in ids
        }
    logs = {name: math.log10(value) for name, value in strength.items()}
    mean = math.fsum(logs.values()) / len(logs)
    return {name: 400 * (value - mean) for name, value in logs.items()}


def best_and_worst(
    contest: Contest, ratings: dict[str, float], max_chosen_length: int
) -> tuple[Judgement, Judgement] | None:
    """Return chosen and rejected judgement; None when all are rated alike, the best one is longer than
    `max_chosen_length` (characters), or both are the same tokens."""
    ranked = sorted(contest.judgements, key=lambda one: (-ratings[one.id], one.id))
    best, worst = ranked[0], ranked[-1]
    if ratings[best.id] - ratings[worst.id] <= ELO_TOLERANCE or len(best.text) > max_chosen_length:
        return None
    return (best, worst) if best.token_ids != worst.token_ids else None


def most_pairs(num_pairs: int, max_share: float) -> int:
    """Return how many pairs of judgements can be added to `num_pairs` others and be at most `max_share` of all."""
    return math.floor(num_pairs * max_share / (1 - max_share) + 1e-9)
