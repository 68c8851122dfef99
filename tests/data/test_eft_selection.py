"""Which judgements become EFT: agreement with a ranking in both modes, the cap of the common score, the yield."""

import random
from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_mega.data.eft_selection import (
    agrees,
    cap_modal_score,
    first_agreement,
    sample_in_order,
    scores_of_ranks,
    yields,
)


@pytest.mark.parametrize(
    ("ranks", "scores", "no_inversion", "strict"),
    [
        ([0, 1, 2], [5, 3, 1], True, True),
        ([0, 1, 2], [5, 5, 1], True, False),  # a tie, but best above worst
        ([0, 1, 2], [5, 1, 1], True, False),
        ([0, 1, 2], [4, 4, 4], False, False),
        ([0, 1, 2], [5, 1, 3], False, False),  # the last two the wrong way round
        ([0, 1, 2], [3, 5, 1], False, False),
        ([0, 1], [1, 3], False, False),
        ([0, 1], [3, 3], False, False),
        ([0, 1], [3.5, 3], True, True),
        ([2, 0, 1], [1, 5, 3], True, True),  # the order of the replies is none of the ranking
        ([0, 1, 2], [5, None, 1], False, False),  # a reply without a score is not left out
        ([0, 0, 1], [5, 4, 3], True, True),  # equals may have any scores
        ([0, 0, 1], [5, 2, 3], False, False),
        ([0, 0, 1], [5, 3, 3], False, False),  # one of the best is not above the worst
        ([0, 0], [5, 3], False, False),  # no ranking
        ([0, 3, 7], [5, 3, 1], True, True),  # ranks with gaps
    ],
)
def test_agreement_with_a_ranking(
    ranks: list[int], scores: list[float | None], no_inversion: bool, strict: bool
) -> None:
    assert agrees(ranks, scores, "no_inversion") is no_inversion
    assert agrees(ranks, scores, "strict") is strict


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=2, max_size=6))
def test_strict_agreement_is_agreement_and_mirrored_scores_never_agree(replies: list[tuple[int, int]]) -> None:
    ranks, scores = [rank for rank, _ in replies], [float(score) for _, score in replies]
    if agrees(ranks, scores, "strict"):
        assert agrees(ranks, scores, "no_inversion")
    if agrees(ranks, scores, "no_inversion"):
        assert not agrees(ranks, [5 - score for score in scores], "no_inversion")


def test_the_first_try_that_agrees_is_taken() -> None:
    scores = [[3.0, 4.0, 5.0, 5.0], [3.0, None, 2.0, 1.0], [4.0, 1.0, 2.0, 0.0]]  # by reply, then by try
    assert first_agreement([0, 1, 2], scores, "no_inversion") == 2
    assert first_agreement([0, 1, 2], scores, "strict") == 3
    assert first_agreement([2, 1, 0], scores, "strict") is None


def test_the_most_common_score_is_cut_to_the_second_most_common() -> None:
    scores = [4.0] * 6 + [3.0] * 2 + [5.0] * 3 + [4.0] * 4
    kept = cap_modal_score(scores, seed=0)
    assert Counter(scores[place] for place in kept) == {4.0: 3, 5.0: 3, 3.0: 2}
    assert kept == sorted(kept) and {6, 7, 8, 9, 10} <= set(kept)
    assert cap_modal_score(scores, seed=0) == kept
    assert {tuple(cap_modal_score(scores, seed=seed)) for seed in range(20)} != {tuple(kept)}, "which ones is by chance"


@pytest.mark.parametrize("scores", [[], [4.0] * 3, [4.0, 4.0, 3.0, 3.0, 1.0]])
def test_nothing_is_cut_without_a_single_most_common_score(scores: list[float]) -> None:
    assert cap_modal_score(scores, seed=0) == list(range(len(scores)))


@given(st.lists(st.sampled_from([0.0, 1.0, 2.5, 4.0, 5.0]), max_size=40), st.integers(0, 9))
def test_the_cap_touches_one_score_only(scores: list[float], seed: int) -> None:
    before, after = Counter(scores), Counter(scores[place] for place in cap_modal_score(scores, seed))
    changed = {score for score in before if before[score] != after[score]}
    assert len(changed) <= 1
    for score in changed:
        assert after[score] == max(count for other, count in before.items() if other != score)


def test_a_limit_keeps_the_order() -> None:
    chosen = sample_in_order([3, 5, 8, 9], 2, seed=1)
    assert len(chosen) == 2 and chosen == sorted(chosen) and set(chosen) <= {3, 5, 8, 9}
    assert sample_in_order([3, 5], 9, seed=1) == [3, 5]


def test_the_yield_counts_prompts_in_both_modes() -> None:
    rising, tied, never = [[5.0, 5.0], [3.0, 3.0]], [[4.0, 5.0], [4.0, 1.0]], [[1.0, None], [2.0, 3.0]]
    result = yields([([0, 1], scores) for scores in (rising, tied, never)])
    assert (result.prompts, result.first_try, result.any_try) == (3, 1, 2)
    assert (result.first_try_strict, result.any_try_strict) == (1, 2)
    three = [([0, 1, 2], [[5.0], [5.0], [1.0]])]
    assert (yields(three).any_try, yields(three).any_try_strict) == (1, 0)


def test_chance_agrees_as_often_as_counting_says() -> None:
    """Two replies, whole scores 0 to 5: 15 of 36 pairs of scores are in order, ties never."""
    pairs = list(product(range(6), repeat=2))
    assert sum(agrees([0, 1], [float(a), float(b)], "no_inversion") for a, b in pairs) == 15
    rng = random.Random(0)
    tries = [[[float(rng.randint(0, 5)) for _ in range(8)] for _ in range(2)] for _ in range(400)]
    met = yields([([0, 1], scores) for scores in tries])
    assert met.any_try == met.any_try_strict > 380 > 200 > met.first_try  # 1 - (21 / 36)^8 = 0.987; 15 / 36 = 0.417


@pytest.mark.parametrize(
    ("ranks", "scores"),
    [
        ([0, 1], [5, 1]),
        ([2, 0, 1], [1, 5, 3]),
        ([0, 1, 2, 3], [5, 4, 2, 1]),  # 5, 3.67, 2.33, 1
        ([0, 1, 2, 3, 4], [5, 4, 3, 2, 1]),
        ([0, 1, 2, 3, 4, 5], [5, 4, 3, 3, 2, 1]),  # 5, 4.2, 3.4, 2.6, 1.8, 1
        ([0, 1, 2, 3, 4, 5, 6, 7, 8], [5, 5, 4, 4, 3, 3, 2, 2, 1]),  # halves are rounded up
        ([0, 0, 1], [5, 5, 1]),
        ([7, 3, 3, 1], [1, 3, 3, 5]),  # gaps do not count
    ],
)
def test_scores_that_follow_from_ranks(ranks: list[int], scores: list[int]) -> None:
    assert scores_of_ranks(ranks) == scores


@given(st.lists(st.integers(0, 30), min_size=2).filter(lambda ranks: len(set(ranks)) > 1))
def test_scores_of_ranks_never_contradict_them(ranks: list[int]) -> None:
    scores = scores_of_ranks(ranks)
    assert (min(scores), max(scores)) == (1, 5) and agrees(ranks, scores, "no_inversion")
    assert agrees(ranks, scores, "strict") or len(set(ranks)) > 5


@pytest.mark.parametrize(("best", "scores"), [(10, [10, 6, 1]), (5, [5, 3, 1]), (1, [1, 1, 0])])
def test_ranks_reach_the_largest_score(best: int, scores: list[int]) -> None:
    assert scores_of_ranks([0, 1, 2], best) == scores
