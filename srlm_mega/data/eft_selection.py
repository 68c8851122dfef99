"""Selection of EFT examples: judgements of ranked replies whose scores agree with the ranking, or scores that follow
from the ranks. Pure functions.

A try is one judgement of every reply to a prompt; it is accepted when its scores agree with the human ranking. The
paper says no more. How agreement is defined, the number of tries, and the cap on the most common score are our choices;
the strict form of agreement is an option.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

Mode = Literal["no_inversion", "strict"]
Scores = Sequence[float | None]
BEST, WORST = 5, 1  # scores of the best and the worst rank


def agrees(ranks: Sequence[int], scores: Scores, mode: Mode) -> bool:
    """Tell whether scores order the replies as their ranks do (0 is the best). `strict`: of two replies with different
    ranks the better one scores higher. `no_inversion`: it never scores lower, and all of the best replies score higher
    than the worst ones. With a missing score, or a single rank, nothing agrees."""
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
    """Return the index of the first accepted try, None when there is none. `scores` is indexed [reply][try]."""
    tries = zip(*scores, strict=True)
    return next((number for number, one in enumerate(tries) if agrees(ranks, one, mode)), None)


def scores_of_ranks(ranks: Sequence[int], best: int = BEST) -> list[int]:
    """Return scores for the replies to one prompt, whose ranks (0 is the best) are not all equal. The best rank has
    `best`, the worst 1 (0 where `best` is 1), those between follow in even steps, rounded half up to whole numbers;
    equal ranks have equal scores."""
    places = {rank: place for place, rank in enumerate(sorted(set(ranks)))}
    worst = min(WORST, best - 1)
    return [math.floor(best - (best - worst) * places[rank] / (len(places) - 1) + 0.5) for rank in ranks]


def cap_modal_score(scores: Sequence[float], seed: int) -> list[int]:
    """Return the indices of the accepted judgements to keep, in order: of the most common score a seeded sample, as
    many as the second most common score has. Nothing is dropped with a single score, or a tie for the most common."""
    counts = Counter(scores).most_common(2)
    if len(counts) < 2:
        return list(range(len(scores)))
    (modal, _), (_, limit) = counts
    modal_indices = [index for index, score in enumerate(scores) if score == modal]
    kept = set(random.Random(f"{seed}/modal").sample(modal_indices, limit))
    return [index for index, score in enumerate(scores) if score != modal or index in kept]


def sample_in_order(indices: Sequence[int], limit: int, seed: int) -> list[int]:
    """Return a seeded sample of at most `limit` of the indices, in their order."""
    chosen = random.Random(f"{seed}/limit").sample(range(len(indices)), min(limit, len(indices)))
    return [indices[position] for position in sorted(chosen)]


@dataclass(frozen=True)
class EftYield:
    """Number of prompts, and of those accepted by the first try and by any try, in both modes."""

    prompts: int
    first_try: int
    any_try: int
    first_try_strict: int
    any_try_strict: int


def yields(sets: Sequence[tuple[Sequence[int], Sequence[Scores]]]) -> EftYield:
    """Count the prompts that are accepted. An element is a prompt's ranks and its scores, indexed [reply][try]."""

    def accepted(mode: Mode) -> tuple[int, int]:
        firsts = [first_agreement(ranks, scores, mode) for ranks, scores in sets]
        return sum(first == 0 for first in firsts), sum(first is not None for first in firsts)

    return EftYield(len(sets), *accepted("no_inversion"), *accepted("strict"))
