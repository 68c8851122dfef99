"""Rank correlations of two scorings of the same responses."""

import math
from collections.abc import Sequence
from itertools import combinations

SCORE_TOLERANCE = 1e-6


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Kendall's tau-b, in [-1, 1], of two scorings of the same items; None when one of them ties all items."""
    signs = [
        (sign(one - other), sign(two - another))
        for (one, two), (other, another) in combinations(zip(first, second, strict=True), 2)
    ]
    first_untied = sum(left != 0 for left, _ in signs)
    second_untied = sum(right != 0 for _, right in signs)
    if first_untied == 0 or second_untied == 0:
        return None
    return sum(left * right for left, right in signs) / math.sqrt(first_untied * second_untied)


def consistency(current: Sequence[float], previous: Sequence[float]) -> float:
    """Return CREAM's C (arXiv 2410.12735): Kendall's tau between two judges' rankings, mapped from [-1, 1] to [0, 1].

    A judge that ties all items says nothing about the order. The value is then 1/2, at which a pair's loss prefers
    neither response.
    """
    tau = kendall_tau(current, previous)
    return 0.5 if tau is None else (1 + tau) / 2


def sign(difference: float) -> int:
    """Return -1, 0 or 1; means that differ in the last bits only count as equal."""
    return (difference > SCORE_TOLERANCE) - (difference < -SCORE_TOLERANCE)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, in [-1, 1], of two scorings; None when one of them ties all items."""
    ranks = [mean_ranks(values) for values in (first, second)]
    middle = (len(first) + 1) / 2
    (one, two) = ([rank - middle for rank in own] for own in ranks)
    size = math.sqrt(sum(value * value for value in one) * sum(value * value for value in two))
    return sum(left * right for left, right in zip(one, two, strict=True)) / size if size > 0 else None


def mean_ranks(values: Sequence[float]) -> list[float]:
    """Return the values' ranks from 1; equal values share their mean rank."""
    ranks = [0.0] * len(values)
    ordered = sorted(range(len(values)), key=values.__getitem__)
    start = 0
    for end in range(1, len(values) + 1):
        if end == len(values) or values[ordered[end]] - values[ordered[start]] > SCORE_TOLERANCE:
            for index in ordered[start:end]:
                ranks[index] = (start + 1 + end) / 2
            start = end
    return ranks
