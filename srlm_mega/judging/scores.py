"""Scores: parsed from a judgement's text, and aggregated. An unparsed score is None, never a number."""

import math
import re
from collections.abc import Sequence

from srlm_mega.records import FinishReason

MAX_SCORE = 5.0

# "Score:" with something that begins like a number after it, on the same line; bold around any part is allowed.
LABEL = re.compile(r"(?<![a-z0-9])score[ \t*_]*:[ \t*_]*(?=[-+−]?\.?[0-9])", re.IGNORECASE)
# The number, then an optional "/5" or "out of 5"; nothing may follow that makes it another number.
NUMBER = re.compile(
    r"(?P<value>[0-9]++(?:\.[0-9]++)?+)(?![0-9.,]*[0-9])"
    r"(?P<scale>[ \t*_]*\(?(?:/|out[ \t]+of)[ \t*_]*(?P<maximum>[0-9.]*[0-9]|\S))?"
    r"(?![a-z%])"
    r"(?![ \t*_]*(?:[-+*/=:x×^–—]|to|or|and)[ \t*_]*[0-9])",
    re.IGNORECASE,
)


def score_of(text: str, finish_reason: FinishReason) -> float | None:
    """Return the score of a sampled judgement. None when there is none to read (`parse_score`), or when the token limit
    cut the judgement off: "Score: 10" without its last token reads 1."""
    return parse_score(text) if finish_reason == "stop" else None


def parse_score(text: str) -> float | None:
    """Return the last "Score: number" of a judgement, 0 to 5. None when there is none, when it is out of range (it is
    never clipped), or when it is part of a sum, a range or another scale than 5."""
    labels = list(LABEL.finditer(text))
    if not labels:
        return None
    number = NUMBER.match(text, labels[-1].end())
    if number is None or number["maximum"] not in (None, "5"):
        return None
    value = float(number["value"])
    return value if value <= MAX_SCORE else None


def mean_score(scores: Sequence[float | None], min_valid: int) -> float | None:
    """Return the mean of the parsed scores, None when fewer than `min_valid` (at least 1) were parsed."""
    valid = [score for score in scores if score is not None]
    if len(valid) < max(1, min_valid):
        return None
    return math.fsum(valid) / len(valid)


def score_variance(scores: Sequence[float | None]) -> float | None:
    """Return the sample variance of one response's parsed scores, None with fewer than two."""
    valid = [score for score in scores if score is not None]
    if len(valid) < 2:
        return None
    mean = math.fsum(valid) / len(valid)
    return math.fsum((score - mean) ** 2 for score in valid) / (len(valid) - 1)
