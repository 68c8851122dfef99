"""Scores in range, and their mean. What a judge's words mean is in test_judges_words.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_mega.judging.scores import mean_score, parse_score, score_variance


@given(st.text())
def test_any_text_gives_a_score_in_range_or_none(text: str) -> None:
    for judgement in (text, f"Score: {text}"):
        score = parse_score(judgement)
        assert score is None or 0 <= score <= 5


@given(st.text(), st.integers(min_value=0, max_value=50))
def test_the_last_line_decides(text: str, tenths: int) -> None:
    assert parse_score(f"{text}\nScore: {tenths / 10}") == tenths / 10


def test_the_mean_is_over_valid_scores() -> None:
    scores = [parse_score(text) for text in ("Score: 4", "Score: 5", "bad")]
    assert mean_score(scores, min_valid=2) == 4.5
    assert mean_score(scores, min_valid=3) is None


def test_no_valid_score_is_no_reward() -> None:
    assert mean_score([None, None], min_valid=1) is None
    assert mean_score([], min_valid=0) is None


@given(st.lists(st.sampled_from([0.0, 0.1, 2.5, 4.7, 5.0, None]), min_size=1))
def test_the_mean_does_not_depend_on_the_order(scores: list[float | None]) -> None:
    assert mean_score(scores, 1) == mean_score(sorted(scores, key=str), 1)


def test_variance_of_one_responses_scores_by_hand() -> None:
    assert score_variance([4, 5, None, 3]) == 1.0  # mean 4: (0 + 1 + 1) / 2
    assert score_variance([4, 4]) == 0 and score_variance([4, None]) is None and score_variance([]) is None


@pytest.mark.parametrize(
    ("text", "most", "score"),
    [
        ("Score: 8", 10, 8), ("Score: 8/10", 10, 8), ("Score: 8 out of ten", 10, 8), ("Score (0-10): 10", 10, 10),
        ("Score: 4/5", 10, None), ("Score: 11", 10, None), ("Score (0-5): 4", 10, None),
        ("Score: 8 out of 100", 10, None),
        ("Score: 73", 100, 73), ("Score: 73/100", 100, 73), ("Score: 1", 1, 1), ("Score: 2", 1, None),
        ("Score: 8", 5, None), ("Score: 4 out of five", 5, 4), ("Score: 4 out of five", 10, None),
    ],
)  # fmt: skip
def test_another_largest_score(text: str, most: int, score: float | None) -> None:
    assert parse_score(text, most) == score
