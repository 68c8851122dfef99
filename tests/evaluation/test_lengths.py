"""Lengths and the length-controlled score: by hand, by scipy, and on judges that only count characters."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from srlm_mega.evaluation.lengths import (
    RIDGE,
    VALUE,
    length_bins,
    length_controlled,
    length_statistics,
    logistic_fit,
    pair_lengths,
    standardised,
)
from srlm_mega.judging.pairwise import Outcome
from srlm_mega.records import Message, PreferencePair


def test_mean_and_median_in_both_units() -> None:
    found = length_statistics(["a", "bb", "cccccc"], [1, 2, 9])
    assert (found.count, found.mean_characters, found.median_characters) == (3, 3, 2)
    assert (found.mean_tokens, found.median_tokens) == (4, 2)
    assert length_statistics(["a"], None).mean_tokens is None
    with pytest.raises(ValueError):
        length_statistics([], None)


def test_chosen_against_rejected() -> None:
    def pair(chosen: str, rejected: str) -> PreferencePair:
        sides = [(Message("assistant", text),) for text in (chosen, rejected)]
        tokens = [tuple(range(len(text))) for text in (chosen, rejected)]
        return PreferencePair("p", (), sides[0], sides[1], "c", "r", 5, 1, (1,), tokens[0], tokens[1])

    found = pair_lengths([pair("aaaa", "b"), pair("aa", "bbb"), pair("aaa", "bb")])
    assert (found.chosen.mean_characters, found.rejected.mean_characters) == (3, 2)
    assert (found.chosen.median_tokens, found.rejected.median_tokens) == (3, 2)
    assert found.chosen_longer == pytest.approx(2 / 3)


def test_bins_by_hand() -> None:
    values = np.array([1.0, 0.0, 0.5, 1.0])
    bins = {one.name: one for one in length_bins(values, [50, 100, 200, 300], [100, 105, 100, 100])}
    assert (bins["shorter"].prompts, bins["shorter"].score) == (1, 1)
    assert (bins["similar"].prompts, bins["similar"].score) == (1, 0)
    assert (bins["longer"].prompts, bins["longer"].score) == (2, 0.75)
    assert bins["longer"].score_low < 0.75 < bins["longer"].score_high
    assert [one.name for one in length_bins(values[:1], [50], [100])] == ["shorter"]


def drawn(score_at_equal: float, effect: float, bias: float, seed: int) -> tuple[list[Outcome], list[int], list[int]]:
    """Outcomes of a judge whose log-odds are those of a score plus an effect times the length feature; ours is longer
    by `bias` on average."""
    rng = np.random.default_rng(seed)
    theirs = rng.integers(800, 1200, 4000)
    ours = theirs + rng.normal(bias, 300, 4000).astype(int)
    logits = np.log(score_at_equal / (1 - score_at_equal)) + effect * standardised((ours - theirs).astype(float))
    outcomes: list[Outcome] = ["win" if won else "loss" for won in rng.random(4000) < 1 / (1 + np.exp(-logits))]
    return outcomes, ours.tolist(), theirs.tolist()


def test_a_judge_that_likes_length_is_seen_through() -> None:
    outcomes, ours, theirs = drawn(score_at_equal=0.4, effect=2.0, bias=300, seed=1)
    found = length_controlled(outcomes, ours, theirs)
    raw = outcomes.count("win") / len(outcomes)
    assert raw > 0.5, "longer, so it wins"
    assert found.score == pytest.approx(0.4, abs=0.03) and found.length_effect == pytest.approx(2.0, abs=0.25)
    assert found.mean_characters_ours - found.mean_characters_theirs == pytest.approx(300, abs=20)
    assert [one.score for one in found.bins] == sorted(one.score for one in found.bins)


def test_a_judge_that_does_not_care_gives_the_raw_score() -> None:
    outcomes, ours, theirs = drawn(score_at_equal=0.6, effect=0.0, bias=300, seed=2)
    found = length_controlled(outcomes, ours, theirs)
    assert found.score == pytest.approx(0.6, abs=0.03) and abs(found.length_effect) < 0.15


def test_equal_lengths_give_the_raw_score_exactly() -> None:
    outcomes: list[Outcome] = ["win", "tie", "loss", "win"]
    found = length_controlled(outcomes, [5] * 4, [5] * 4)
    assert found.score == pytest.approx(2.5 / 4, abs=1e-6) and found.length_effect == 0


def test_the_interval_is_as_wide_as_estimates_vary() -> None:
    """The score of 60 draws has a standard deviation; the interval of one draw is about 2 * 1.96 of it wide."""

    def first_400(seed: int) -> tuple[list[Outcome], list[int], list[int]]:
        outcomes, ours, theirs = drawn(score_at_equal=0.4, effect=2.0, bias=300, seed=seed)
        return outcomes[:400], ours[:400], theirs[:400]

    def score(outcomes: list[Outcome], ours: list[int], theirs: list[int]) -> float:
        differences = np.array(ours, dtype=float) - np.array(theirs)
        return logistic_fit(np.array([VALUE[one] for one in outcomes]), standardised(differences))[0]

    logits = [score(*first_400(seed)) for seed in range(60)]
    found = length_controlled(*first_400(60))
    assert found.score is not None and found.score_low is not None and found.score_high is not None
    assert found.score_low < found.score < found.score_high
    low, high = (np.log(end / (1 - end)) for end in (found.score_low, found.score_high))
    assert high - low == pytest.approx(2 * 1.96 * np.std(logits), rel=0.3)
    assert length_controlled(["win"] * 5, [5] * 5, [5] * 5).score_low is None, "five prompts"


def test_where_one_side_is_nearly_always_longer_nobody_can_say() -> None:
    outcomes: list[Outcome] = ["win", "loss"] * 50
    assert length_controlled(outcomes, [10] * 91 + [1] * 9, [5] * 100).score is None
    assert length_controlled(outcomes, [10] * 90 + [1] * 10, [5] * 100).score is not None
    assert length_controlled(outcomes, [1] * 91 + [10] * 9, [5] * 100).score is None


def test_where_one_side_is_always_longer_nobody_can_say() -> None:
    assert length_controlled(["win", "loss"], [10, 20], [5, 6]).score is None
    assert length_controlled(["win", "loss"], [10, 5], [5, 6]).score is not None


Values = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-500, 500)), min_size=2, max_size=30)


@given(Values)
def test_newton_finds_what_scipy_finds(pairs: list[tuple[float, int]]) -> None:
    values = np.array([value for value, _ in pairs])
    feature = standardised(np.array([float(difference) for _, difference in pairs]))

    def objective(weights: np.ndarray) -> float:
        logits = weights[0] + weights[1] * feature
        loss = np.logaddexp(0, logits) - values * logits
        return float(loss.sum() + weights @ RIDGE @ weights / 2)

    found = np.array(logistic_fit(values, feature))
    assert objective(found) <= minimize(objective, np.zeros(2), method="BFGS").fun + 1e-6
    assert objective(found + np.array([0.0, 0.3])) > objective(found), "the objective tells weights apart"
