"""Verdicts: which of two responses the last "Verdict:" of a judgement prefers; None where that cannot be read."""

import re
from typing import Literal

from srlm_mega.judging.statements import CLOSING, END, OPENING, SPACE, statements, unclosed
from srlm_mega.records import FinishReason

Verdict = Literal["first", "second", "tie"]
REMARK = 300  # characters behind a verdict that are looked at
NOUN = r"(?:response|answer|assistant|option|candidate|review|model|output)"
# "A", "Response B", decorated; then nothing, or words that go on about it.
PREFERRED = re.compile(
    rf"(?P<opening>{OPENING})(?:{NOUN}:?{SPACE}++)?{OPENING}(?P<letter>[ab]){END}(?P<closing>{CLOSING})"
    rf"(?=$|[.,;:!。，](?!\w)|[-–—(]"
    r"|(?:is|was|wins|won|has|does|gives|provides|because|since|as|for|by|with|over|beats|outperforms|better)\b)",
    re.IGNORECASE,
)
TIE = re.compile(
    rf"{OPENING}(?:(?:it{SPACE}++is|it['’]s){SPACE}++)?(?:a{SPACE}++)?[*_`\"]*+tie{END}{CLOSING}"
    rf"(?![-–—/&|]\w|(?:or|and|vs\.?|versus|breaker)\b)",
    re.IGNORECASE,
)
BOTH = re.compile(rf"\bboth\b|\ba{CLOSING}{SPACE}*+(?:and|&){SPACE}*+(?:{NOUN}{SPACE}++)?{OPENING}b\b", re.IGNORECASE)
BEATS = re.compile(
    rf"{OPENING}(?:{NOUN}{SPACE}++)?(?P<letter>[ab]){SPACE}*+>++{SPACE}*+(?:{NOUN}{SPACE}++)?(?!(?P=letter))[ab]{END}",
    re.IGNORECASE,
)
# The letter's own clause says that it is not preferred.
CLAUSE_END = re.compile(r"[.,;(]|\b(?:since|because|while|whereas|but|though)\b", re.IGNORECASE)
DENIED = re.compile(
    r"\b(?:not|no|never|neither|worse|worst|weaker|inferior|less|wrong|bad|poor|beaten|lost|loses|fails|equal|equally|same"
    r"|tied?|as\s++\w++\s++as)\b|n['’]t\b",
    re.IGNORECASE,
)
ALTERNATIVE = re.compile(r"[-–—,;:(]?\s*+(?:or|and|vs\.?|versus)\b|\(\s*+(?:worse|not)\b", re.IGNORECASE)
# Another choice: a letter that stands alone and is no article, or a tie.
OTHER = re.compile(
    rf"(?<!\w)(?:[AB]{END}(?!{SPACE}++(?!is|was|has|wins|and|or|for|does|lacks|misses|fails)[a-z])|tie\b)"
)
# ... which is named only to say that it is the worse one.
BEATEN_BEFORE = re.compile(rf"(?:than|over|beats|outperforms|not|unlike|against|>)\W*+(?:{NOUN}\W++)?$", re.IGNORECASE)
BEATEN_AFTER = re.compile(
    r"\W*+(?:(?:is|was)\s++(?:worse|weaker|less|not|inferior|wrong|incomplete)|lacks|misses|omits|fails|loses"
    r"|does(?:\s++not|n['’]t))\b",
    re.IGNORECASE,
)


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
    tie = TIE.match(last.text)
    if tie is not None:
        rest = last.text[tie.end() :][:REMARK]
        return None if OTHER.search(rest) and not BOTH.search(rest) else "tie"
    if beats := BEATS.match(last.text):
        return "first" if beats["letter"] in "aA" else "second"
    found = PREFERRED.match(last.text)
    if found is None or unclosed(found["opening"], found["closing"]):
        return None
    rest = last.text[found.end() :][:REMARK]
    if ALTERNATIVE.match(rest) or DENIED.search(CLAUSE_END.split(rest, 1)[0]):
        return None
    if not all(is_beaten(other, rest) for other in OTHER.finditer(rest)):
        return None
    return "first" if found["letter"] in "aA" else "second"


def is_beaten(other: re.Match[str], remark: str) -> bool:
    """Tell whether a remark names the other choice only as the worse one."""
    before, behind = remark[: other.start()], remark[other.end() :]
    return bool(BEATEN_BEFORE.search(before[-40:]) or BEATEN_AFTER.match(behind))
