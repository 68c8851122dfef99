"""What a judge states behind a label, such as `Score:`. Marks of decoration do not change it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

SPACE = r"[^\S\n]"
QUOTES = "*_`\"'“”‘’«»„$|"
TAG = r"(?-i:</?(?!tie>)[a-z]++>)"  # <A> and <tie> are choices in brackets
END = r"(?![^\W_])"  # of a word: a letter or a digit is none; Markdown's _ is
# What may stand around a value: Markdown, quotes, brackets, tags, LaTeX's \boxed{4}. Loops are possessive: nothing is
# tried twice, so a text of any length takes linear time.
OPENING = rf"(?:{SPACE}|{TAG}|[{QUOTES}<\[({{【「]|\\(?:boxed|text\w*+|math\w*+)\{{)*+"
CLOSING = rf"(?:{SPACE}|{TAG}|[{QUOTES}>\])}}】」])*+"


@dataclass(frozen=True)
class Statement:
    """The text behind a label: the rest of its line or, where that is empty, the next line that is not
    (`on_next_line`). `note` is what stands in brackets before the colon, as in "Score (0-5):"."""

    text: str
    on_next_line: bool
    note: str


def statements(label: str, text: str) -> Iterator[Statement]:
    """Yield what stands behind every `label:` of a text, the last one first; letters may be of any case."""
    decorated = rf"[ \t{QUOTES}]*+"
    colon = rf"{decorated}(?:\((?P<note>[^()\n]{{1,40}}+)\){decorated})?[:：﹕]"
    labels = list(re.finditer(rf"(?<![a-z0-9]){label}{colon}", text, re.IGNORECASE))
    end = len(text)
    for one in reversed(labels):
        line, _, below = text[one.end() : end].partition("\n")
        on_next_line = not line.strip(QUOTES + " \t\r")
        if on_next_line:
            line = re.sub(r"^[-•]\s+", "", below.lstrip(QUOTES + " \t\r\n").partition("\n")[0])
        yield Statement(line, on_next_line, one["note"] or "")
        end = one.start()


def unclosed(opening: str, behind: str) -> bool:
    """Tell whether a `<` before a value is no bracket but "less than": nothing closes it."""
    return "<" in re.sub(TAG, "", opening) and ">" not in re.sub(TAG, "", behind)
