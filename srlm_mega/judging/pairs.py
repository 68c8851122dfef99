"""Preference pairs: the best against the worst candidate of each prompt, by mean judge score."""

import random
from collections.abc import Sequence
from itertools import product
from typing import Literal, NamedTuple

from srlm_mega.config.rounds import PairsConfig, Ties
from srlm_mega.judging.agreement import SCORE_TOLERANCE, consistency
from srlm_mega.judging.scored_candidates import ScoredCandidate
from srlm_mega.records import Candidate, Message, PreferencePair

NoPair = Literal["tied", "small_gap", "identical", "too_few", "long_chosen"]


class Ranked(NamedTuple):
    """A candidate with a score, which can be in a pair."""

    score: float
    candidate: Candidate
    variance: float | None


def pair_of(
    group: Sequence[ScoredCandidate],
    settings: PairsConfig,
    round_number: int,
    seed: int,
    anchors: Sequence[ScoredCandidate] | None = None,
) -> PreferencePair | NoPair:
    """Return the pair of one prompt's candidates, or the reason why there is none. With `anchors`, candidates of
    another model to the same prompt, the rejected one is taken from them. Truncated and unscored candidates are left
    out. Lengths are characters; docs/protocol.md has the definitions.

    `rho` widens what counts as best and as worst by that share of the gap (Meta-Rewarding, arXiv 2407.19594): the
    shortest of the best is paired with the longest of the worst. With 0, `ties` decides among equal scores.
    """
    best_first = ranked(group)
    worst_first = best_first if anchors is None else ranked(anchors)
    if not best_first or not worst_first or (anchors is None and len(best_first) < 2):
        return "too_few"
    best, worst = max(one.score for one in best_first), min(one.score for one in worst_first)
    if best - worst <= SCORE_TOLERANCE:  # means of thirds may differ in the last bits
        return "tied"
    if best - worst <= settings.min_gap + SCORE_TOLERANCE:
        return "small_gap"
    rho = settings.rho_of(round_number)
    widening = rho * (best - worst) + SCORE_TOLERANCE
    top = [one for one in best_first if one.score >= best - widening]
    bottom = [one for one in worst_first if one.score <= worst + widening]
    if settings.max_chosen_length is not None:
        top = [one for one in top if len(one.candidate.text) <= settings.max_chosen_length]
    if not top:
        return "long_chosen"
    different = [(one, other) for one, other in product(top, bottom) if differ(one.candidate, other.candidate)]
    if not different:
        return "identical"
    # With rho, a pair inside the widened ends may have a smaller gap than best and worst have.
    choices = [pair for pair in different if pair[0].score - pair[1].score > settings.min_gap + SCORE_TOLERANCE]
    if not choices:
        return "small_gap"
    chosen, rejected = pick(choices, rho, settings.ties, seed)
    weight = weight_of(group) if settings.weighs_consistency(round_number) else 1.0
    return preference_pair(chosen, rejected, weight)


def ranked(group: Sequence[ScoredCandidate]) -> list[Ranked]:
    """Return the candidates with a score, sorted by id: a seeded pick must not depend on the order of the file."""
    found = [Ranked(item.score, item.candidate, item.variance) for item in group if item.score is not None]
    return sorted(found, key=lambda one: one.candidate.id)


def pick(choices: Sequence[tuple[Ranked, Ranked]], rho: float, ties: Ties, seed: int) -> tuple[Ranked, Ranked]:
    """Return the preferred pair; a pick seeded by the prompt's id decides among equals."""

    def preference(pair: tuple[Ranked, Ranked]) -> tuple[float, ...]:
        chosen, rejected = (len(one.candidate.text) for one in pair)
        if rho > 0:
            return chosen, -rejected
        match ties:
            case "random":
                return ()
            case "shortest":
                return chosen, rejected
            case "lowest_variance":
                # A single parsed score has no variance: such a candidate comes last.
                return tuple(float("inf") if one.variance is None else one.variance for one in pair)

    if len(choices) == 1:
        return choices[0]
    preferences = [preference(pair) for pair in choices]
    first = min(preferences)
    equals = [pair for pair, own in zip(choices, preferences, strict=True) if own == first]
    if len(equals) == 1:
        return equals[0]
    return random.Random(f"{seed}/{choices[0][0].candidate.prompt_id}").choice(equals)


def weight_of(group: Sequence[ScoredCandidate]) -> float:
    """Return the consistency, 0 to 1, of this model's and the previous model's ranking of a prompt's candidates."""
    both = [(item.score, item.earlier) for item in group if item.score is not None and item.earlier is not None]
    return consistency([now for now, _ in both], [before for _, before in both])


def differ(first: Candidate, second: Candidate) -> bool:
    """Tell whether two responses differ in text and in tokens."""
    return first.text != second.text and first.token_ids != second.token_ids


def preference_pair(chosen: Ranked, rejected: Ranked, weight: float) -> PreferencePair:
    """Return the record that DPO trains on."""
    best, worst = chosen.candidate, rejected.candidate
    assert best.prompt_token_ids == worst.prompt_token_ids, f"{best.id}, {worst.id}: one prompt in different token ids"
    return PreferencePair(
        id=f"{best.prompt_id}-pair",
        prompt=(*((Message("system", best.system),) if best.system else ()), Message("user", best.prompt)),
        chosen=(Message("assistant", best.text),),
        rejected=(Message("assistant", worst.text),),
        chosen_id=best.id,
        rejected_id=worst.id,
        chosen_score=chosen.score,
        rejected_score=rejected.score,
        prompt_token_ids=best.prompt_token_ids,
        chosen_token_ids=best.token_ids,
        rejected_token_ids=worst.token_ids,
        consistency=weight,
        chosen_logprob=best.cumulative_logprob,
        rejected_logprob=worst.cumulative_logprob if worst.model_hash == best.model_hash else None,
    )
