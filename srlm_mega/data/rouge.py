"""ROUGE-L against a growing pool of texts: an exact test for similar ones that does not compare all of them.

F1 = 2 * LCS / (words + words), the longest common subsequence counted in words, is above a threshold only when the LCS
reaches a whole number that follows from the two lengths. The LCS is no longer than the shorter text (length bound) and
no longer than what the texts share as bags of words (overlap bound). So two similar texts of known lengths must share
one of their few rarest words: an inverted index of those finds all that can be similar, and only they are compared.

ROUGE is defined for English, by words of ASCII letters and digits. Texts of ASCII are compared by exactly those; others
by the letters and digits of their own scripts.
"""

import re
import unicodedata
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

import numpy as np
import regex
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist

NOT_ROUGE_TOKEN = re.compile(r"[^a-z0-9]+")
CJK = r"\p{Han}\p{Bopomofo}\p{Hiragana}\p{Katakana}\p{Hangul}"  # what a space need not part
RUN = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}]*")  # marks are vowels in many scripts
WORD = regex.compile(rf"[{CJK}]\p{{M}}*|[\p{{L}}\p{{N}}--{CJK}][\p{{L}}\p{{N}}\p{{M}}--{CJK}]*", regex.VERSION1)
FIRST_REORDERING = 256  # texts
LENGTH = 2**32  # a text's key in the index is its length times this, and its number
UNKNOWN = "\0"  # stands for a word that no text of the pool has


def rouge_words(text: str) -> list[str]:
    """Return the words that ROUGE-L counts: runs of letters and digits without case, in Chinese, Japanese and Korean
    each character. Of ASCII text they are those of the package rouge-score."""
    if text.isascii():
        return [word for word in NOT_ROUGE_TOKEN.split(text.lower()) if word]
    return list(WORD.findall(folded(text)))


def normalised(text: str) -> str:
    """Return a text for comparison: letters and digits only, no case, single spaces; unchanged if nothing is left."""
    return " ".join(RUN.findall(folded(text))) or text


def folded(text: str) -> str:
    """Return a text without case, in which what looks alike is the same: full-width letters, composed accents."""
    return unicodedata.normalize("NFKC", text).casefold()


class RougePool:
    """A pool of texts that finds out whether any has a ROUGE-L F1 above `threshold` (0 to 1) with a given text.

    Each distinct word is mapped to one character, so that rapidfuzz compares texts in C. The second, third, ...
    occurrence of a word in a text is an element of its own, which makes a bag of words a set.
    """

    def __init__(self, threshold: float, texts: Iterable[str] = ()) -> None:
        self._threshold = threshold
        self._needed = [0]
        self._characters: dict[str, str] = {}
        self._elements: dict[tuple[str, int], int] = {}
        self._frequency: list[int] = []
        self._order: dict[int, int] = {}
        self._texts: list[str] = []
        self._bags: list[list[int]] = []
        self._index: dict[int, list[int]] = {}  # by element: keys of its texts, from short to long
        self._lengths: dict[int, range] = {}
        self._reorder_at = FIRST_REORDERING
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        """Add a text to the pool."""
        words = rouge_words(text)
        for word in words:
            # Private-use planes and beyond the surrogates: 1,056,768 distinct words.
            self._characters.setdefault(word, chr(0xE000 + len(self._characters)))
        bag = [self._elements.setdefault(element, len(self._elements)) for element in as_set(words)]
        self._frequency += [0] * (len(self._elements) - len(self._frequency))
        for element in bag:
            self._frequency[element] += 1
        self._texts.append("".join(self._characters[word] for word in words))
        self._bags.append(bag)
        if len(self._texts) == self._reorder_at:
            self._reorder()
        else:
            self._index_text(len(self._texts) - 1)

    def has_similar(self, text: str) -> bool:
        """Tell whether any text of the pool has an F1 with this one above the threshold."""
        words = rouge_words(text)
        found = self._within_bounds(words)
        if not found:
            return False
        query = "".join(self._characters.get(word, UNKNOWN) for word in words)
        others = [self._texts[key % LENGTH] for key in found]
        common = cdist([query], others, scorer=LCSseq.similarity, dtype=np.int32)[0]
        total = len(query) + np.fromiter(map(len, others), dtype=np.int64, count=len(others))
        return bool((2 * common / total > self._threshold).any())

    def _within_bounds(self, words: Sequence[str]) -> set[int]:
        """Return the keys of the texts that length bound and overlap bound leave for comparison."""
        size = len(words)
        known = [self._elements.get(element) for element in as_set(words)]
        bag = sorted((element for element in known if element is not None), key=self._rank)
        shortest, longest = self._similar_lengths(size).start, self._similar_lengths(size).stop - 1
        found: set[int] = set()
        for place, element in enumerate(bag):
            # Of a text with none of the elements before this one, those from here on can be common, if it has them.
            while longest >= shortest and self._common_words(size + longest) > len(bag) - place:
                longest -= 1
            if longest < shortest:
                break
            keys = self._index.get(element, [])
            found.update(keys[bisect_left(keys, shortest * LENGTH) : bisect_left(keys, (longest + 1) * LENGTH)])
        return found

    def _similar_lengths(self, size: int) -> range:
        """Return the lengths of texts that can be similar to one of `size` words: F1 <= 2 * shorter / (sum of both)."""
        if size not in self._lengths:
            low = high = size
            while low > 1 and self._common_words(size + low - 1) <= low - 1:
                low -= 1
            while self._common_words(size + high + 1) <= size:
                high += 1
            self._lengths[size] = range(low, high + 1)
        return self._lengths[size]

    def _common_words(self, total: int) -> int:
        """Return the shortest LCS with an F1 above the threshold for two texts of `total` words together."""
        while len(self._needed) <= total:
            words, common = len(self._needed), self._needed[-1]
            while 2 * common / words <= self._threshold:
                common += 1
            self._needed.append(common)
        return self._needed[total]

    def _index_text(self, number: int) -> None:
        """Index a text by its rarest words, enough of them that every similar text shares at least one."""
        bag = sorted(self._bags[number], key=self._rank)
        if bag:
            shortest = self._similar_lengths(len(bag)).start
            for element in bag[: len(bag) - self._common_words(len(bag) + shortest) + 1]:
                insort(self._index.setdefault(element, []), len(bag) * LENGTH + number)

    def _rank(self, element: int) -> int:
        """Return an element's position in the order from rare to frequent; elements added since it was made lead."""
        return self._order.get(element, -element)

    def _reorder(self) -> None:
        """Order the elements by frequency and rebuild the index. The order decides the speed, not the answers."""
        by_frequency = sorted(range(len(self._frequency)), key=self._frequency.__getitem__)
        self._order = {element: position for position, element in enumerate(by_frequency)}
        self._index.clear()
        self._reorder_at = 2 * len(self._texts)
        for number in range(len(self._texts)):
            self._index_text(number)


def as_set(words: Sequence[str]) -> list[tuple[str, int]]:
    """Return a bag of words as a set: each word with the number of its earlier occurrences."""
    seen: dict[str, int] = {}
    elements = []
    for word in words:
        before = seen.get(word, 0)
        elements.append((word, before))
        seen[word] = before + 1
    return elements
