"""Kendall's tau against scipy, and CREAM's consistency by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

from srlm_mega.judging.agreement import consistency, kendall_tau, spearman

Scores = st.integers(0, 15).map(lambda thirds: thirds / 3)


@given(st.lists(st.tuples(Scores, Scores), min_size=2, max_size=9))
def test_tau_is_scipys(pairs: list[tuple[float, float]]) -> None:
    first, second = [one for one, _ in pairs], [two for _, two in pairs]
    ours, theirs = kendall_tau(first, second), kendalltau(first, second).statistic
    assert math.isnan(theirs) if ours is None else ours == pytest.approx(theirs)


@pytest.mark.filterwarnings("ignore:An input array is constant")
@given(st.lists(st.tuples(Scores, Scores), min_size=2, max_size=9))
def test_rho_is_scipys(pairs: list[tuple[float, float]]) -> None:
    first, second = [one for one, _ in pairs], [two for _, two in pairs]
    ours, theirs = spearman(first, second), spearmanr(first, second).statistic
    assert math.isnan(theirs) if ours is None else ours == pytest.approx(theirs)


def test_rho_by_hand() -> None:
    """Ranks 1 2 3 and 1.5 1.5 3: deviations -1 0 1 and -.5 -.5 1; 1.5 / sqrt(2 * 1.5)."""
    assert spearman([1, 2, 3], [4, 4, 5]) == pytest.approx(1.5 / math.sqrt(3))
    assert spearman([1], [2]) is None and spearman([], []) is None


def test_tau_by_hand() -> None:
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))
    assert kendall_tau([4, 4], [1, 2]) is None and kendall_tau([], []) is None


def test_means_that_differ_in_the_last_bit_are_tied() -> None:
    assert kendall_tau([(4 + 4 + 5) / 3, 13 / 3 + 1e-12], [1, 2]) is None


def test_consistency_maps_tau_to_a_share() -> None:
    assert consistency([1, 2], [3, 4]) == 1 and consistency([1, 2], [4, 3]) == 0
    assert consistency([1, 2], [3, 3]) == 0.5, "no order is known"
