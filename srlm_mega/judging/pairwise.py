"""Comparison of two responses by a judge in both orders: a preference in one order only is a tie."""

from pathlib import Path
from typing import Literal

from srlm_mega.judging.template import Template
from srlm_mega.judging.verdicts import Verdict

Outcome = Literal["win", "tie", "loss"]


def pairwise_template() -> Template:
    """Return the shipped template; its placeholders are `instruction`, `first` and `second`."""
    path = Path(__file__).with_name("pairwise.txt")
    text = path.read_text(encoding="utf-8").rstrip("\n")
    return Template.from_text(text, str(path), ("instruction", "first", "second"))


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
