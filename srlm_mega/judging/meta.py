"""The meta-judge (Meta-Rewarding, arXiv 2407.19594): a model's judgements of one response, compared by itself in both
orders; the best and the worst by Elo become a pair that trains the judge."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from srlm_mega.judging.scored_candidates import ScoredCandidate
from srlm_mega.judging.template import Template
from srlm_mega.records import Candidate, Judgement, MetaJudgement

PRIOR_WINS = 0.1  # of each judgement over each other: ratings stay finite where one wins everything
ITERATIONS = 200
ELO_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Contest:
    """One response and its judgements that can be compared."""

    candidate: Candidate
    judgements: tuple[Judgement, ...]
    variance: float


@dataclass(frozen=True)
class PositionWeights:
    """What a win counts in each place: the place that wins more often counts less."""

    first: float
    second: float


def meta_template() -> Template:
    """The shipped one; its place-holders are `instruction`, `response`, `first` and `second`."""
    path = Path(__file__).with_name("meta.txt")
    return Template.from_text(
        path.read_text(encoding="utf-8").rstrip("\n"), str(path), ("instruction", "response", "first", "second")
    )


def contest_of(group: Sequence[tuple[ScoredCandidate, Sequence[Judgement]]]) -> Contest | None:
    """The response whose scores vary most among a prompt's, with the judgements that ended by themselves and have a
    score. None where no two of one response differ in score."""
    found: Contest | None = None
    for item, judgements in group:
        usable = tuple(one for one in judgements if one.score is not None and one.finish_reason == "stop")
        variance = item.variance or 0.0
        if len({one.score for one in usable}) > 1 and (found is None or variance > found.variance):
            found = Contest(item.candidate, usable, variance)
    return found


def comparisons(contest: Contest) -> list[tuple[Judgement, Judgement]]:
    """All pairs of a response's judgements, each in both orders."""
    return list(permutations(contest.judgements, 2))


def position_weights(judged: Iterable[MetaJudgement]) -> PositionWeights:
    """From all of a round's comparisons; halves where nothing was won."""
    verdicts = [one.verdict for one in judged]
    first, second = verdicts.count("first"), verdicts.count("second")
    if first + second == 0:
        return PositionWeights(0.5, 0.5)
    return PositionWeights(second / (first + second), first / (first + second))


def elo(ids: Sequence[str], judged: Iterable[MetaJudgement], weights: PositionWeights) -> dict[str, float]:
    """Ratings with mean 0, by maximum likelihood of weighted wins (Bradley-Terry, minorise-maximise)."""
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
    """Chosen and rejected judgement; None where all are rated alike or the best one is too long."""
    ranked = sorted(contest.judgements, key=lambda one: (-ratings[one.id], one.id))
    best, worst = ranked[0], ranked[-1]
    if ratings[best.id] - ratings[worst.id] <= ELO_TOLERANCE or len(best.text) > max_chosen_length:
        return None
    return (best, worst) if best.token_ids != worst.token_ids else None


def most_pairs(num_pairs: int, max_share: float) -> int:
    """How many pairs of judgements may join so many of responses, to be `max_share` of all at most."""
    return math.floor(num_pairs * max_share / (1 - max_share) + 1e-9)
