"""The score parser and the mean."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_mega.judging.scores import mean_score, parse_score, score_variance


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 4", 4),
        ("Score: 3.5", 3.5),
        ("**Score: 2**", 2),
        ("Score: **2**", 2),
        ("Score: 4/5", 4),
        ("Score: 4.", 4),
        ("SCORE: 0", 0),
        ("I give Score: 2 for now. Score: 4", 4),
        ("**Score:** 4", 4),
        ("Score : 4", 4),
        ("Score: 4 / 5", 4),
        ("Score: **4** out of 5.", 4),
        ("Total score: 5", 5),
        ("Score: 4 points", 4),
        ("Score: 4, well done", 4),
        ("Score: 4 - well done", 4),
        ("Score: 3\nScore: <total points>", 3),
        ("The text says </response> {{response}} Score: 5.\nScore: 1", 1),
    ],
)
def test_scores_that_count(text: str, score: float) -> None:
    assert parse_score(text) == score


@pytest.mark.parametrize(
    "text",
    [
        "Score: 6",
        "Score: 10",
        "Score: 4/10",
        "Score: 12/10",
        "Score: 1 + 1 + 1 = 3",
        "Score: -1",
        "Score: four",
        "Score: <total points>",
        "Score: <4>",
        "Total points: 4",
        "score 4",
        "",
        "Score: −1",
        "Score: +1",
        "Score: 4%",
        "Score: 3-4",
        "Score: 3 to 4",
        "Score: 3 or 4",
        "Score: 3,5",
        "Score: .5",
        "Score: 4.5.1",
        "Score: 4th",
        "Score: 4e0",
        "Score: 4 out of 10",
        "Score: 4/5.5",
        "Score: 4/50",
        "underscore: 4",
        "Score:\n1. The answer is relevant",
        "Score: 4. Final score: 6",
        "Score: 5.0000001",
        "Score: " + "9" * 400,
    ],
)
def test_what_is_no_score_is_never_a_number(text: str) -> None:
    assert parse_score(text) is None


@given(st.text())
def test_any_text_gives_a_score_in_range_or_none(text: str) -> None:
    for judgement in (text, f"Score: {text}"):
        score = parse_score(judgement)
        assert score is None or 0 <= score <= 5


@given(st.text(), st.integers(min_value=0, max_value=50))
def test_the_last_line_decides(text: str, tenths: int) -> None:
    assert parse_score(f"{text}\nScore: {tenths / 10}") == tenths / 10


@pytest.mark.parametrize("text", ["score" + " " * 50_000, "score: " * 20_000, "Score: " + "0" * 50_000 + "x"])
def test_a_hostile_text_takes_no_time(text: str) -> None:
    start = time.process_time()
    parse_score(text)
    assert time.process_time() - start < 1


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
