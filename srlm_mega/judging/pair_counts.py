"""Pairs of a whole round, with counts of what became of its prompts, candidates and judgements."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import get_args

from pydantic import with_config

from srlm_mega.config.rounds import PairsConfig
from srlm_mega.judging.pairs import NoPair, pair_of
from srlm_mega.judging.scored_candidates import CandidateState, MergeJoin, ScoredCandidate
from srlm_mega.records import STRICT, PreferencePair


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class PairCounts:
    """Counts of a round. Each prompt is in exactly one of pairs, tied, small_gap, identical, too_few, long_chosen; each
    candidate in exactly one of scored, truncated, unscored.

    judgements_truncated: judgements cut at the token limit; they have no score, so they are among `unparsed`.
    duplicates: candidates whose text an earlier one of the same prompt has. empty: those without any text.
    score_entropy: bits, of the judgements' scores rounded to integers, 0 to log2(6) = 2.58. The means are over pairs:
    the gap in score, and characters of chosen and rejected responses. consistency is CREAM's C, 1 when it is not
    configured.
    """

    prompts: int
    pairs: int
    tied: int
    small_gap: int
    identical: int
    too_few: int
    candidates: int
    scored: int
    truncated: int
    unscored: int
    judgements: int
    unparsed: int
    long_chosen: int = 0
    duplicates: int = 0
    score_entropy: float = 0.0
    mean_gap: float = 0.0
    mean_chosen_length: float = 0.0
    mean_rejected_length: float = 0.0
    mean_consistency: float = 1.0
    judgements_truncated: int = 0
    empty: int = 0


@dataclass
class PairCounter:
    """Running counts of `pairs_of`."""

    prompts: Counter[NoPair] = field(default_factory=Counter)
    states: Counter[CandidateState] = field(default_factory=Counter)
    scores: Counter[float | None] = field(default_factory=Counter)
    pairs: int = 0
    duplicates: int = 0
    empty: int = 0
    gap: float = 0.0
    chosen_length: int = 0
    rejected_length: int = 0
    consistency: float = 0.0

    def add(self, group: Sequence[ScoredCandidate], found: PreferencePair | NoPair) -> None:
        """Count one prompt's candidates and the pair, or the reason why there is none."""
        for item in group:
            self.states[item.state] += 1
            for score in item.scores:
                self.scores[score] += 1
        self.duplicates += len(group) - len({item.candidate.text for item in group})
        self.empty += sum(not item.candidate.text for item in group)
        if not isinstance(found, PreferencePair):
            self.prompts[found] += 1
            return
        self.pairs += 1
        self.gap += found.chosen_score - found.rejected_score
        self.chosen_length += len(found.chosen[0].content)
        self.rejected_length += len(found.rejected[0].content)
        self.consistency += found.consistency

    def counts(self) -> PairCounts:
        """Return the counts so far."""
        pairs = max(self.pairs, 1)
        return PairCounts(
            prompts=self.pairs + self.prompts.total(),
            pairs=self.pairs,
            **{reason: self.prompts[reason] for reason in get_args(NoPair)},
            candidates=self.states.total(),
            **{state: self.states[state] for state in get_args(CandidateState)},
            judgements=self.scores.total(),
            unparsed=self.scores[None],
            duplicates=self.duplicates,
            score_entropy=entropy(self.scores),
            mean_gap=self.gap / pairs,
            mean_chosen_length=self.chosen_length / pairs,
            mean_rejected_length=self.rejected_length / pairs,
            mean_consistency=self.consistency / pairs if self.pairs else 1.0,
            empty=self.empty,
        )


def pairs_of(
    prompts: Iterable[Sequence[ScoredCandidate]],
    settings: PairsConfig,
    round_number: int,
    seed: int,
    counter: PairCounter,
    anchors: Iterable[Sequence[ScoredCandidate]] | None = None,
) -> Iterator[PreferencePair]:
    """Yield at most one pair per prompt, in the prompts' order; `counter` counts all of them. `anchors` are candidates
    to the same prompts of the model that rejected responses come from; some prompts may have none."""
    others = None if anchors is None else by_prompt(anchors)
    for group in prompts:
        theirs = None if others is None else others.take(group[0].candidate.prompt_id)
        found = pair_of(group, settings, round_number, seed, theirs)
        counter.add(group, found)
        if isinstance(found, PreferencePair):
            yield found
    if others is not None:
        others.finish()


def by_prompt(prompts: Iterable[Sequence[ScoredCandidate]]) -> MergeJoin[ScoredCandidate]:
    """Return another model's candidates, to be joined with this one's by prompt."""
    return MergeJoin(chain.from_iterable(prompts), lambda item: item.candidate.prompt_id, "the anchors' prompt")


def entropy(scores: Counter[float | None]) -> float:
    """Return the entropy in bits of the scores, rounded half up to integers; unparsed ones are left out."""
    whole: Counter[int] = Counter()
    for score, count in scores.items():
        if score is not None:
            whole[math.floor(score + 0.5)] += count
    return sum(-count / whole.total() * math.log2(count / whole.total()) for count in whole.values()) + 0.0
