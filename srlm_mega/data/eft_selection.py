"""EFT: which judgements of ranked replies teach M1 to judge. Pure functions on scores and ranks.

A try is one judgement of every reply to a prompt; it is accepted when its scores agree with the human ranking. The
paper says so and no more: what agreement is, how many tries there are and how much of the most common score goes are
choices of ours, with the strict form of agreement as an option.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

Mode = Literal["no_inversion", "strict"]
Scores = Sequence[float | None]


def agrees(ranks: Sequence[int], scores: Scores, mode: Mode) -> bool:
    """Whether scores order replies as their ranks do (0 is the best). `strict`: of two replies with different ranks the
    better one scores higher. `no_inversion`: it never scores lower, and the best replies all score higher than the
    worst ones. A missing score agrees with nothing."""
    known = [(rank, score) for rank, score in zip(ranks, scores, strict=True) if score is not None]
    if len(known) < len(scores) or len(set(ranks)) < 2:
        return False
    above = [(better, worse) for (one, better), (other, worse) in product(known, known) if one < other]
    if mode == "strict":
        return all(better > worse for better, worse in above)
    best = min(score for rank, score in known if rank == min(ranks))
    worst = max(score for rank, score in known if rank == max(ranks))
    return best > worst and all(better >= worse for better, worse in above)


def first_agreement(ranks: Sequence[int], scores: Sequence[Scores], mode: Mode) -> int | None:
    """The first try that is accepted; `scores[reply][try]`. None when there is none."""
    tries = zip(*scores, strict=True)
    return next((number for number, one in enumerate(tries) if agrees(ranks, one, mode)), None)


def cap_modal_score(scores: Sequence[float], seed: int) -> list[int]:
    """Which of the accepted judgements are kept, in order: of the most common score a seeded sample, as many as the
    second most common has. A single score, or a tie for the most common, loses nothing."""
    counts = Counter(scores).most_common(2)
    if len(counts) < 2:
        return list(range(len(scores)))
    (modal, _), (_, limit) = counts
    places = [place for place, score in enumerate(scores) if score == modal]
    kept = set(random.Random(f"{seed}/modal").sample(places, limit))
    return [place for place, score in enumerate(scores) if score != modal or place in kept]


def sample_in_order(places: Sequence[int], limit: int, seed: int) -> list[int]:
    """At most `limit` of them, a seeded sample in their order."""
    chosen = random.Random(f"{seed}/limit").sample(range(len(places)), min(limit, len(places)))
    return [places[position] for position in sorted(chosen)]


@dataclass(frozen=True)
class EftYield:
    """Prompts whose ranking was met, by the first try and by any, in both modes."""

    prompts: int
    first_try: int
    any_try: int
    first_try_strict: int
    any_try_strict: int


def yields(sets: Sequence[tuple[Sequence[int], Sequence[Scores]]]) -> EftYield:
    """How many of the (ranks, scores by reply and try) are accepted."""

    def met(mode: Mode) -> tuple[int, int]:
        firsts = [first_agreement(ranks, scores, mode) for ranks, scores in sets]
        return sum(first == 0 for first in firsts), sum(first is not None for first in firsts)

    return EftYield(len(sets), *met("no_inversion"), *met("strict"))
