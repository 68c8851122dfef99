"""New prompts by Self-Instruct: few-shot text for the writer, its continuation split into tasks, and the filters.

The filters' values are those of Wang et al. 2022 (arXiv 2212.10560) and its bootstrapping script. Their rules of form
are for English: they count words between spaces, know English key words, and want an ASCII letter first.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from srlm_mega.data.rouge import RougePool

HEADER = "Come up with a series of tasks:"
NUMBER_AT_LINE_START = re.compile(r"\n[ \t]*[0-9]{1,3} ?\.(?=\s|$)")
NUMBER_ANYWHERE = re.compile(r"(?:^|\s)[0-9]{1,3} ?\.(?=\s|$)")
BLANK_LINE = re.compile(r"\n[ \t]*\n")
# Tasks that a text-only model cannot do.
KEYWORDS = re.compile(r"\b(?:images?|graphs?|pictures?|files?|maps?|draw|plot|go to)\b", re.IGNORECASE)
PROGRAM_START = "write a program"

RejectReason = Literal[
    "too_short", "too_long", "keyword", "program", "starts_with_punctuation", "starts_non_ascii", "duplicate", "similar"
]


def few_shot_prompt(shots: Sequence[str]) -> str:
    """Return the text that the writer continues: the header, the shots numbered from 1, and the next number."""
    lines = [f"{number}. {one_line(shot)}" for number, shot in enumerate(shots, start=1)]
    return "\n".join([HEADER, *lines, f"{len(shots) + 1}."])


def parse_tasks(continuation: str, truncated: bool) -> list[str]:
    """Split a continuation of `few_shot_prompt` into tasks: at `<number>.` at line starts, or anywhere when no line
    starts so (a tokenizer may not keep line breaks). A task ends at a blank line; the last task of a truncated
    continuation is dropped."""
    by_line = NUMBER_AT_LINE_START.search(continuation) is not None
    tasks = (NUMBER_AT_LINE_START if by_line else NUMBER_ANYWHERE).split(continuation)
    if truncated:
        tasks = tasks[:-1]
    cut = [one_line(BLANK_LINE.split(task.strip(), maxsplit=1)[0]) for task in tasks]
    return [task for task in cut if task]


def one_line(text: str) -> str:
    """Return a text with every run of white space as one space."""
    return " ".join(text.split())


class KnownTexts:
    """Texts that new ones must not repeat, neither exactly nor nearly (ROUGE-L F1 above `rouge_l_max`)."""

    def __init__(self, rouge_l_max: float, texts: Iterable[str]) -> None:
        self._rouge_l_max = rouge_l_max
        self._exact: set[str] = set()
        self._pool = RougePool(rouge_l_max)
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Add a text to the known ones."""
        self._exact.add(normalised(text))
        if self._rouge_l_max < 1:  # at 1 only an exact duplicate is too similar: no need to compare
            self._pool.add(text)

    def repeated_by(self, text: str) -> Literal["duplicate", "similar"] | None:
        """Return how a text repeats a known one, None when it does not."""
        if normalised(text) in self._exact:
            return "duplicate"
        return "similar" if self._rouge_l_max < 1 and self._pool.has_similar(text) else None


class TaskFilter:
    """Filter of new tasks. It remembers the seeds and the accepted tasks, and counts the rejected ones by reason."""

    def __init__(self, min_words: int, max_words: int, rouge_l_max: float, seeds: Iterable[str]) -> None:
        self._min_words = min_words
        self._max_words = max_words
        self._known = KnownTexts(rouge_l_max, seeds)
        self.accepted = 0
        self.rejected: Counter[str] = Counter()

    def accept(self, task: str) -> bool:
        """Tell whether a task is kept. It is then known; otherwise the reason is counted."""
        reason = self.reason_against(task)
        if reason is not None:
            self.rejected[reason] += 1
            return False
        self._known.add(task)
        self.accepted += 1
        return True

    def reason_against(self, task: str) -> RejectReason | None:
        """Return the first rule that a task breaks, None for a good one. The cheap rules come first."""
        return reason_against_form(task, self._min_words, self._max_words) or self._known.repeated_by(task)


def reason_against_form(task: str, min_words: int, max_words: int) -> RejectReason | None:
    """Return the first rule on the task alone that it breaks, None when it breaks none. The rules are for English."""
    words = len(task.split())
    first = task.lstrip()[:1]
    if words < min_words:
        return "too_short"
    if words > max_words:
        return "too_long"
    if KEYWORDS.search(task):
        return "keyword"
    if task.lstrip().casefold().startswith(PROGRAM_START):
        return "program"
    if first in string.punctuation:
        return "starts_with_punctuation"
    if not first.isascii():
        return "starts_non_ascii"
    return None


def normalised(text: str) -> str:
    """Return a text for exact comparison: no case, single spaces."""
    return one_line(text).casefold()
