"""Scores: parsed from a judgement's text, and aggregated. An unparsed score is None, never a number."""

import math
import re
from collections.abc import Sequence

from srlm_mega.judging.statements import CLOSING, END, OPENING, QUOTES, SPACE, Statement, statements, unclosed
from srlm_mega.records import FinishReason

MAX_SCORE = 5.0

DIGITS = r"\d++(?:\.\d++)?+"
IN_WORDS = "zero|two|three|four|five|six|seven|eight|nine|ten|hundred|half|quarter|third"
WORDS = {"three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "hundred": 100}
FRACTIONS = "¼-¾⅐-⅟²³¹⁰-₉"  # and small digits
NUMBER = rf"(?:{DIGITS}|[{FRACTIONS}]|(?:one|{IN_WORDS}){END})"
UNIT = rf"(?:(?:points?|pts?|marks?|stars?){END}|[分点점])"
# A statement is VALUE, perhaps SCALE, then a remark that says no other number and does not blur this one. VALUE is a
# number, decorated, perhaps with a unit, and not the beginning of 4th, 4e0, 4.5.1 or 3,5.
VALUE = re.compile(
    rf"(?P<opening>{OPENING})(?P<value>{DIGITS})(?![.,]\d)(?=$|[\W_]|{UNIT}){CLOSING}(?:{UNIT}{CLOSING})?",
    re.IGNORECASE,
)
# "/ 5", "out of 5", ", of a possible 5", "(max 5)", "on a scale from 0 to 5".
SCALE = re.compile(
    rf"(?:\\?[/／⁄]|[,(\[（—–-]?{SPACE}*+(?:(?:out{SPACE}++)?of\b|over\b|from\b|on\b|max(?:imum)?\b[.:]?)(?:{SPACE}++[a-z]++){{0,4}}?)"
    rf"{OPENING}(?:(?P<least>[01]){SPACE}*+(?:to|[-–—]){SPACE}*+)?(?P<most>{NUMBER})(?={UNIT}|[\W_]|$){CLOSING}"
    rf"(?:{UNIT}{CLOSING})?",
    re.IGNORECASE,
)
CLAUSE = re.compile(r"(?:[^.;!?。；！？]|\.(?=[.\d])){0,300}+")
# What makes another number of the one before it; "one" alone is a word of prose.
FURTHER = re.compile(
    rf"\d|[{FRACTIONS}]|\b(?:{IN_WORDS}){END}|(?:[-+–—−*×x=:&~]|\b(?:to|or|and|plus|minus|times|less|by){END}){SPACE}*+one{END}",
    re.IGNORECASE,
)
BLURS = re.compile(
    rf"[+±%‰°^<≈/\\÷|]|[-–—−]{SPACE}*+(?:$|[.,])|per{SPACE}?cent{END}|[,(-]?{SPACE}*+(?:or|ish|approx\w*+|roughly|maybe|perhaps|possibly|"
    rf"at{SPACE}++(?:most|least|best|worst)|and{SPACE}++(?:more|less|higher|lower|above|below)){END}",
    re.IGNORECASE,
)
REMARK = re.compile(rf"\([^()\d]*\)[{QUOTES}\s.!]*$")
PLACEHOLDER = re.compile(r"[^\w<\n]*+<[^<>\d\n]*[a-z][^<>\d\n]*>", re.IGNORECASE)  # of a template: <total points>


def score_of(text: str, finish_reason: FinishReason, most: float = MAX_SCORE) -> float | None:
    """Return the score of a sampled judgement, 0 to `most`. None when there is none to read (`parse_score`), or when
    the token limit cut the judgement off: "Score: 10" without its last token reads 1."""
    return parse_score(text, most) if finish_reason == "stop" else None


def parse_score(text: str, most: float = MAX_SCORE) -> float | None:
    """Return the score that a judgement states last, 0 to `most`, as "Score: number": decorated or not, on the label's
    line or alone on the next one, perhaps with "/ 5" or "out of 5" (of `most`). None when the last "Score:" has no such
    number, when it is out of range (it is never clipped), or part of a sum, a range, another scale or another number. A
    template's "Score: <total points>" states nothing."""
    for last in statements("score", text):
        number = VALUE.match(last.text)
        if number is not None or not PLACEHOLDER.match(last.text):
            return None if number is None else stated(last, number, most)
    return None


def stated(last: Statement, number: re.Match[str], most: float) -> float | None:
    """Return the score of a statement that begins with a number, None where it says more than that."""
    if not is_of(most, last.note):
        return None
    end = number.end()
    scale = SCALE.match(last.text, end)
    if scale is not None:
        if not is_number(most, scale["most"]):
            return None
        end = scale.end()
    rest = last.text[end:]
    clause = CLAUSE.match(rest)
    assert clause is not None, "it matches any text"
    if BLURS.match(rest) or FURTHER.search(clause[0]):
        return None
    if last.on_next_line and rest.strip(QUOTES + " \t\r.!。") and not REMARK.match(rest):
        return None
    if unclosed(number["opening"], last.text[number.end("value") : end]):
        return None
    value = float(number["value"])
    return value if value <= most else None


def is_of(most: float, note: str) -> bool:
    """Tell whether a label's note, such as 0-5 or "out of 5", names no other scale."""
    numbers = re.findall(NUMBER, note, re.IGNORECASE)
    return not numbers or is_number(most, numbers[-1])


def is_number(value: float, written: str) -> bool:
    """Tell whether digits or a word mean a number."""
    is_digits = re.fullmatch(DIGITS, written) is not None
    return float(written) == value if is_digits else WORDS.get(written.lower()) == value


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
