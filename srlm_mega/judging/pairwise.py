"""Comparison of two responses by a judge in both orders: a preference in one order only is a tie."""

import re
from pathlib import Path
from typing import Literal

from srlm_mega.judging.template import Template
from srlm_mega.records import FinishReason

Verdict = Literal["first", "second", "tie"]
Outcome = Literal["win", "tie", "loss"]
WORDS: dict[str, Verdict] = {"a": "first", "b": "second", "tie": "tie"}
VERDICT = re.compile(r"(?<![a-z0-9])verdict[ \t*_]*:[ \t*_]*(a|b|tie)(?![a-z0-9])", re.IGNORECASE)


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
    """Return the last verdict in a judgement's text, None when there is none."""
    found = VERDICT.findall(text)
    return WORDS[found[-1].lower()] if found else None


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
