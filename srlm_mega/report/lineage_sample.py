"""Sample of a round for the report's lineage explorer: prompts with their candidates, judgements and pair.

A round may have a million candidates, of which a page shows a part. A prompt is kept when the hash of its id lies below
a threshold, which is halved whenever the kept prompts exceed their limit. So memory is bounded, the files are read once
and in order, the sample is uniform, and the same run gives the same page.
"""

from dataclasses import dataclass, field
from typing import Literal

import xxhash

from srlm_mega.text import shortened, visible

PROMPT_CHARACTERS, CANDIDATE_CHARACTERS, JUDGEMENT_CHARACTERS = 2000, 1500, 1000
RECORD_BYTES = 80  # approximate size of a record in the page besides its text
Outcome = Literal["pair", "tied", "too few scores", "no pair", "not paired yet"]


@dataclass(slots=True)
class JudgementLeaf:
    """One judgement of a candidate."""

    score: float | None
    text: str


@dataclass(slots=True)
class CandidateNode:
    """One candidate, its length in tokens, and its judgements."""

    id: str
    text: str
    tokens: int
    finish_reason: str
    judgements: list[JudgementLeaf] = field(default_factory=list)

    @property
    def score(self) -> float | None:
        """Mean score of the judgements that have one, None without any."""
        scores = [one.score for one in self.judgements if one.score is not None]
        return sum(scores) / len(scores) if scores else None


@dataclass(slots=True)
class PairLeaf:
    """The pair of a prompt's candidates."""

    id: str
    chosen_id: str
    rejected_id: str
    chosen_score: float
    rejected_score: float


@dataclass(slots=True)
class PromptTree:
    """A prompt with its candidates and pair. `bytes` is its approximate size in the page."""

    id: str
    text: str
    candidates: dict[str, CandidateNode] = field(default_factory=dict)
    pair: PairLeaf | None = None
    bytes: int = 0

    def outcome(self, paired: bool) -> Outcome:
        """Return what became of the prompt; `paired` says whether the round's pairs are made."""
        if self.pair is not None:
            return "pair"
        if not paired:
            return "not paired yet"
        scores = {round(one.score, 6) for one in self.candidates.values() if one.score is not None}
        scored = sum(one.score is not None for one in self.candidates.values())
        if scored < 2:
            return "too few scores"
        return "tied" if len(scores) == 1 else "no pair"


class LineageSample:
    """Kept prompts of one round, up to `max_bytes`. Prompts are added first, then candidates, judgements and pairs."""

    def __init__(self, max_bytes: int) -> None:
        self.total = 0
        self._max_bytes, self._bytes = max_bytes, 0
        self._threshold = 1.0
        self._trees: dict[str, PromptTree] = {}
        self._tree_of: dict[str, PromptTree] = {}  # by candidate id

    @property
    def trees(self) -> list[PromptTree]:
        """Kept prompts, in the order in which they were added."""
        return list(self._trees.values())

    def halve(self) -> None:
        """Drop about half of the kept prompts."""
        self._threshold /= 2
        self._trees = {name: tree for name, tree in self._trees.items() if hash_fraction(name) < self._threshold}
        self._tree_of = {one: tree for tree in self._trees.values() for one in tree.candidates}
        self._bytes = sum(tree.bytes for tree in self._trees.values())

    def add_prompt(self, prompt_id: str, text: str) -> None:
        """Count a prompt, and keep it if its hash is below the threshold."""
        self.total += 1
        if hash_fraction(prompt_id) < self._threshold:
            tree = PromptTree(prompt_id, visible(shortened(text, PROMPT_CHARACTERS)))
            self._trees[prompt_id] = tree
            self._grow(tree, tree.text)

    def add_candidate(self, prompt_id: str, candidate_id: str, text: str, tokens: int, finish_reason: str) -> None:
        """Add a candidate if its prompt is kept."""
        tree = self._trees.get(prompt_id)
        if tree is not None:
            node = CandidateNode(candidate_id, visible(shortened(text, CANDIDATE_CHARACTERS)), tokens, finish_reason)
            tree.candidates[candidate_id] = node
            self._tree_of[candidate_id] = tree
            self._grow(tree, node.text)

    def add_judgement(self, candidate_id: str, score: float | None, text: str) -> None:
        """Add a judgement if its candidate is kept."""
        tree = self._tree_of.get(candidate_id)
        if tree is not None:
            leaf = JudgementLeaf(score, visible(shortened(text, JUDGEMENT_CHARACTERS)))
            tree.candidates[candidate_id].judgements.append(leaf)
            self._grow(tree, leaf.text)

    def add_pair(self, pair: PairLeaf) -> None:
        """Add a pair if its candidates are kept."""
        tree = self._tree_of.get(pair.chosen_id)
        if tree is not None and pair.rejected_id in tree.candidates:
            tree.pair = pair

    def _grow(self, tree: PromptTree, text: str) -> None:
        size = len(text.encode()) + RECORD_BYTES
        tree.bytes += size
        self._bytes += size
        while self._bytes > self._max_bytes and len(self._trees) > 1:
            self.halve()


def hash_fraction(name: str) -> float:
    """Return a name's hash as a number in [0, 1)."""
    return xxhash.xxh3_64_intdigest(name.encode()) / 2**64
