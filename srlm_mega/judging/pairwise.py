"""Comparison of two responses by a judge in both orders: a preference in one order only is a tie."""

import re
from pathlib import Path
from typing import Literal

from srlm_mega.judging.statements import CLOSING, END, OPENING, SPACE, statements, unclosed
from srlm_mega.judging.template import Template
from srlm_mega.records import FinishReason

Verdict = Literal["first", "second", "tie"]
Outcome = Literal["win", "tie", "loss"]
# "A", "Response B", "a tie", decorated; a letter ends the statement, or words go on that speak of it alone.
PREFERRED = re.compile(
    rf"(?P<opening>{OPENING})(?:(?:response|answer|assistant|option|candidate|review|model|output){SPACE}++)?{OPENING}"
    rf"(?P<letter>[ab]){END}(?P<closing>{CLOSING})"
    rf"(?=$|[.,;:!。，](?!\w)|[-–—(]|(?:is|was|wins|won|has|does|gives|provides|because|since|as|for|by|with)\b)",
    re.IGNORECASE,
)
TIE = re.compile(
    rf"{OPENING}(?:(?:it{SPACE}++is|it['’]s){SPACE}++)?(?:a{SPACE}++)?{OPENING}tie{END}{CLOSING}"
    rf"(?![-–—/&|]{SPACE}*+\w|(?:or|and|vs\.?|versus|breaker)\b)",
    re.IGNORECASE,
)
# In what follows a letter: another choice beside it, or that it is not preferred.
UNDONE = re.compile(
    r"[-–—,;:(]?\s*+(?:or|and|vs\.?|versus)\b"
    r"|[-–—,;:(]?\s*+(?:[ab]|tie)(?!\w)(?!\s++(?:is|was|has|does|lacks|misses|fails)\b)"
    r"|(?:is|was|has|does)\b[^.,;(]*?\b"
    r"(?:not|no|neither|worse|worst|weaker|inferior|equal|equally|same|tie|tied|as\s++\w++\s++as)\b",
    re.IGNORECASE,
)


def pairwise_template() -> Template:
    """Return the shipped template; its placeholders are `instruction`, `first` and `second`."""
    path = Path(__file__).with_name("pairwise.txt")
    text = path.read_text(encoding="utf-8").rstrip("\n")
    return Template.from_text(text, str(path), ("instruction", "first", "second"))


def verdict_of(text: str, finish_reason: FinishReason) -> Verdict | None:
    """Return the verdict of a sampled comparison. None when there is none to read (`parse_verdict`), or when the token
    limit cut it off: "Verdict: A and B are alike" may lose all after its A."""
    return parse_verdict(text) if finish_reason == "stop" else None


def parse_verdict(text: str) -> Verdict | None:
    """Return the verdict that a judgement states last, as "Verdict: A", B or tie: decorated or not, on the label's line
    or the next one. None when the last "Verdict:" names none of them, or more than one."""
    last = next(statements("verdict", text), None)
    if last is None:
        return None
    if TIE.match(last.text):
        return "tie"
    found = PREFERRED.match(last.text)
    if found is None or unclosed(found["opening"], found["closing"]) or UNDONE.match(last.text, found.end()):
        return None
    return "first" if found["letter"] in "aA" else "second"


def outcome(ours_first: Verdict | None, ours_second: Verdict | None) -> Outcome | None:
    """Return the outcome of a comparison in both orders: a win or a loss only if both orders say so. None when one of
    them has no verdict."""
    if ours_first is None or ours_second is None:
        return None
    match ours_first, ours_second:
        case "first", "second":
            return "win"
        case "second", "first":
            return "loss"
        case _:
            return "tie"
