"""Agreement of judge scores with ranked replies, under every convention for ties and undefined correlations.

Conventions differ by tens of points on the same scores, so all are computed; a pairwise accuracy means nothing without
the tie rate.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from srlm_mega.evaluation.results import JudgedPrompt, JudgeMetrics
from srlm_mega.judging.agreement import kendall_tau, spearman
from srlm_mega.judging.scores import MAX_SCORE
from srlm_mega.records import RankedReplies

RankedScore = tuple[int, float | None]
"""Rank of a reply (0 is the best) and its score by the judge, None when no score could be parsed."""

SCORE_DECIMALS = 6


def with_ranks(ranked: RankedReplies, scores: Sequence[float | None]) -> list[RankedScore]:
    """Return the replies' ranks with their scores; `scores` are in the order of the prompt's replies."""
    return [(reply.rank, score) for reply, score in zip(ranked.replies, scores, strict=True)]


def judge_metrics(prompts: Iterable[Sequence[RankedScore]], perfect: float = MAX_SCORE) -> JudgeMetrics:
    """Return all metrics over prompts with ranked and scored replies, iterated once. Replicates count separately."""
    return MetricSums.of(prompts, perfect).metrics()


def judged_prompt(prompt_id: str, judgements: int, replicates: Iterable[Sequence[RankedScore]]) -> JudgedPrompt:
    """Return the pairs of one prompt, scored in several replicates by means of so many judgements."""
    orders = MetricSums.of(replicates).orders
    return JudgedPrompt(prompt_id, judgements, pairs=orders.total(), right=orders[1], tied=orders[0])


@dataclass
class MetricSums:
    """Running counts over prompts. `orders`: pairs in the right order (1), inverted (-1), tied (0). `fives`: replies
    with the mean score `perfect`, by whether no reply to their prompt is ranked above them."""

    perfect: float = MAX_SCORE
    prompts: int = 0
    replies: int = 0
    scored: int = 0
    fully_parsed: int = 0
    usable: int = 0
    exact: int = 0
    orders: Counter[int] = field(default_factory=Counter)
    fives: Counter[bool] = field(default_factory=Counter)
    spearman: list[float] = field(default_factory=list)
    kendall: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, prompts: Iterable[Sequence[RankedScore]], perfect: float = MAX_SCORE) -> "MetricSums":
        """Count all prompts."""
        sums = cls(perfect)
        for prompt in prompts:
            sums.add(prompt)
        return sums

    def add(self, prompt: Sequence[RankedScore]) -> None:
        """Count one prompt's replies."""
        # Rounded, so that two means of thirds that differ in the last bit are a tie for the correlations too.
        kept = [(rank, round(score, SCORE_DECIMALS)) for rank, score in prompt if score is not None]
        orders = _pair_orders(kept)
        best = min((rank for rank, _ in prompt), default=0)  # of all replies, scored or not
        self.prompts += 1
        self.replies += len(prompt)
        self.scored += len(kept)
        self.fully_parsed += len(kept) == len(prompt)
        self.usable += bool(orders)
        self.exact += bool(orders) and all(order == 1 for order in orders)
        self.orders.update(orders)
        self.fives.update(rank == best for rank, score in kept if score == self.perfect)
        qualities, scores = [-float(rank) for rank, _ in kept], [score for _, score in kept]
        for defined, statistic in ((self.spearman, spearman), (self.kendall, kendall_tau)):
            value = statistic(qualities, scores)
            if value is not None:
                defined.append(value)

    def metrics(self) -> JudgeMetrics:
        """Return all metrics of the prompts so far."""
        right, wrong, tied = self.orders[1], self.orders[-1], self.orders[0]
        pairs, fives = right + wrong + tied, self.fives.total()
        return JudgeMetrics(
            pair_acc_untied=ratio(right, right + wrong),
            pair_acc_half=ratio(right + tied / 2, pairs),
            pair_acc_strict=ratio(right, pairs),
            tie_rate=ratio(tied, pairs),
            five_best=ratio(self.fives[True], fives),
            five_best_count=fives,
            exact_match=ratio(self.exact, self.usable),
            spearman_drop=ratio(math.fsum(self.spearman), len(self.spearman)),
            spearman_zero=ratio(math.fsum(self.spearman), self.usable),
            kendall_drop=ratio(math.fsum(self.kendall), len(self.kendall)),
            kendall_zero=ratio(math.fsum(self.kendall), self.usable),
            parse_failure=ratio(self.replies - self.scored, self.replies),
            fully_parsed_prompts=ratio(self.fully_parsed, self.prompts),
            prompts=self.prompts,
            usable_prompts=self.usable,
            replies=self.replies,
            pairs=pairs,
        )


def _pair_orders(prompt: Sequence[tuple[int, float]]) -> list[int]:
    """Return for each pair of different ranks: 1 in the right order, -1 inverted, 0 tied."""
    orders = []
    for (first_rank, first), (second_rank, second) in combinations(prompt, 2):
        if first_rank != second_rank:
            better, worse = (first, second) if first_rank < second_rank else (second, first)
            orders.append((better > worse) - (better < worse))
    return orders


def ratio(part: float, whole: float) -> float | None:
    """Return part / whole, None when the whole is 0."""
    return part / whole if whole else None
