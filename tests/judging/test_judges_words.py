"""What judges write, and the number or choice in it: judges_words.jsonl, which grows; properties of both parsers."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_mega.judging.scores import parse_score, score_of
from srlm_mega.judging.verdicts import parse_verdict, verdict_of

CORPUS = [json.loads(line) for line in (Path(__file__).parent / "judges_words.jsonl").read_text("utf-8").splitlines()]
MARKS = [("", ""), ("**", "**"), ("*", "*"), ("`", "`"), ('"', '"'), ("“", "”"), ("<", ">"), ("[[", "]]"), ("(", ")"),
         ("$\\boxed{", "}$"), ("<b>", "</b>"), (" ", "  "), ("__", "__.")]  # fmt: skip
COLONS = [": ", ":", " : ", ":** ", "：", ":\n", ":\n\n", "** :\t"]
SCORES = [number / 10 for number in range(51)]


@pytest.mark.parametrize("line", CORPUS, ids=lambda line: line["text"][:40] or "empty")
def test_a_line_of_the_corpus(line: dict[str, Any]) -> None:
    parse = parse_score if "score" in line else parse_verdict
    assert parse(line["text"]) == line.get("score", line.get("verdict"))


@given(st.text(), st.sampled_from(MARKS), st.sampled_from(COLONS), st.sampled_from(SCORES), st.sampled_from(["", "/5"]))
def test_decoration_does_not_change_a_score(
    before: str, marks: tuple[str, str], colon: str, score: float, scale: str
) -> None:
    assert parse_score(f"{before}\nscore{colon}{marks[0]}{score}{scale}{marks[1]}\nthat is all") == score


@given(st.text(), st.sampled_from(MARKS), st.sampled_from(COLONS), st.sampled_from(["A", "B"]))
def test_decoration_does_not_change_a_verdict(before: str, marks: tuple[str, str], colon: str, choice: str) -> None:
    expected = {"A": "first", "B": "second"}[choice]
    assert parse_verdict(f"{before}\nVerdict{colon}{marks[0]}{choice}{marks[1]}\nthat is all") == expected
    assert parse_verdict(f"{before}\nVerdict{colon}{marks[0]}tie{marks[1]}\nthat is all") == "tie"


@given(st.sampled_from(CORPUS), st.integers(min_value=0, max_value=80))
def test_a_cut_text_has_no_value(line: dict[str, Any], length: int) -> None:
    """ "Score: 4/10" cut behind its 4 reads like a score: the token limit is what tells."""
    assert score_of(line["text"][:length], "length") is None and verdict_of(line["text"][:length], "length") is None


@given(
    st.sampled_from(CORPUS), st.sampled_from(["Score: unclear", "Score: 3 or 4", "final score:\nnone", "Score: N/A"])
)
def test_an_unreadable_last_score_counts(line: dict[str, Any], last: str) -> None:
    assert parse_score(f"{line['text']}\n{last}") is None


@given(st.text(alphabet='score:verdict \n*_<>[](){}/0123456789.,-+abtieofu½→"', max_size=60))
def test_any_text_gives_a_value_or_none(text: str) -> None:
    for judgement in (text, f"Score: {text}", f"Verdict: {text}"):
        score = parse_score(judgement)
        assert score is None or 0 <= score <= 5
        assert parse_verdict(judgement) in (None, "first", "second", "tie")


HOSTILE = [
    "Score: 4" + "*" * 50_000, "score" + " " * 50_000, "score: " * 20_000, "Score: " + "0" * 50_000 + "x",
    "Score: <a> " * 10_000, "score(" * 20_000, "Score: 4 of" + " a" * 50_000, "Score: " + "(" * 50_000,
    "Score: 4" + " -" * 50_000, "Score: " + "<a" * 50_000, "Score: 4" + "." * 50_000, "Score: 4 or " * 10_000,
    ("Score:" + "\n" * 10) * 5_000, "Score: \\text" + "a" * 50_000, "Score: 4" + " and" * 50_000,
    "Verdict: A" + "*" * 50_000, "Verdict: A is" + " as a" * 20_000, "Verdict: A is as" + " " * 50_000 + "x",
    "Verdict: A," + " as x" * 20_000, "verdict: " * 20_000,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:20])
def test_a_hostile_text_takes_no_time(text: str) -> None:
    """A loop that tries again takes minutes for these; one that does not, milliseconds."""
    start = time.process_time()
    parse_score(text)
    parse_verdict(text)
    assert time.process_time() - start < 1
