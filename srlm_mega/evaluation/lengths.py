"""Lengths of responses, and their effect on a win rate: judges prefer long answers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray
from pydantic import with_config

from srlm_mega.evaluation.win_rates import FEWEST_PROMPTS, wilson_interval
from srlm_mega.judging.pairwise import Outcome
from srlm_mega.records import STRICT, Message, PreferencePair

VALUE: dict[Outcome, float] = {"win": 1.0, "tie": 0.5, "loss": 0.0}
SIMILAR = 0.1  # lengths that differ by less than this share of the longer one
# Precisions of a normal prior on intercept and effect of length: the effect stays finite when length alone decides, the
# intercept is nearly free.
RIDGE = np.diag([1e-6, 1.0])
NEWTON_STEPS = 50
LEAST_SIDE = 0.1  # of the prompts on either side of equal lengths: with fewer the score rests on a handful
RESAMPLES = 500
Floats = NDArray[np.float64]


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class LengthStatistics:
    """Lengths of `count` texts. Those in tokens are None when only the text is known."""

    count: int
    mean_characters: float
    median_characters: float
    mean_tokens: float | None
    median_tokens: float | None


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class LengthBin:
    """Score over the prompts on which our response is shorter than theirs, similar (within 10 % of the longer), or
    longer, with its 95 % interval."""

    name: str
    prompts: int
    score: float
    score_low: float
    score_high: float


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class LengthControlled:
    """Length-controlled score. `score` is the score at equal lengths by a logistic regression, as in AlpacaEval 2 but
    without its terms per instruction and its pull towards a gamed baseline; None when one side is longer on more than
    90 % of the prompts, so that nothing can be said. `score_low` and `score_high` are its 95 % interval over prompts,
    None with fewer than six or without a score. `length_effect` is the coefficient of length (above 0: longer wins).
    `bins` without prompts are left out."""

    score: float | None
    length_effect: float
    mean_characters_ours: float
    mean_characters_theirs: float
    bins: tuple[LengthBin, ...]
    score_low: float | None = None
    score_high: float | None = None


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class PairLengths:
    """Lengths of chosen and rejected responses, and the share of pairs whose chosen response has more characters."""

    chosen: LengthStatistics
    rejected: LengthStatistics
    chosen_longer: float


def length_statistics(texts: Sequence[str], tokens: Sequence[int] | None) -> LengthStatistics:
    """Return mean and median in characters, and in tokens if `tokens` has them. Raise ValueError without any text."""
    if not texts:
        raise ValueError("lengths of no texts")
    characters = [len(text) for text in texts]
    return LengthStatistics(
        count=len(texts),
        mean_characters=fmean(characters),
        median_characters=float(median(characters)),
        mean_tokens=None if tokens is None else fmean(tokens),
        median_tokens=None if tokens is None else float(median(tokens)),
    )


def pair_lengths(pairs: Iterable[PreferencePair]) -> PairLengths:
    """Return the lengths of a round's pairs. Longer chosen responses train the next model to write longer ones."""
    kept = list(pairs)
    chosen = [text_of(pair.chosen) for pair in kept]
    rejected = [text_of(pair.rejected) for pair in kept]
    return PairLengths(
        chosen=length_statistics(chosen, [len(pair.chosen_token_ids) for pair in kept]),
        rejected=length_statistics(rejected, [len(pair.rejected_token_ids) for pair in kept]),
        chosen_longer=fmean(len(one) > len(other) for one, other in zip(chosen, rejected, strict=True)),
    )


def text_of(messages: Sequence[Message]) -> str:
    """Return the text of a pair's chosen or rejected response."""
    return "".join(message.content for message in messages)


def length_controlled(outcomes: Sequence[Outcome], ours: Sequence[int], theirs: Sequence[int]) -> LengthControlled:
    """Return the length-controlled score of outcomes and both responses' lengths (characters), prompt by prompt. Raise
    ValueError without outcomes."""
    if not outcomes:
        raise ValueError("a length-controlled score of no outcomes")
    values = np.array([VALUE[one] for one in outcomes])
    differences = np.array(ours, dtype=np.float64) - np.array(theirs, dtype=np.float64)
    intercept, effect = logistic_fit(values, standardised(differences))
    estimable = min((differences <= 0).mean(), (differences >= 0).mean()) >= LEAST_SIDE
    low, high = score_interval(values, differences) if estimable and len(outcomes) >= FEWEST_PROMPTS else (None, None)
    return LengthControlled(
        score=float(sigmoid(np.array(intercept))) if estimable else None,
        length_effect=effect,
        mean_characters_ours=fmean(ours),
        mean_characters_theirs=fmean(theirs),
        bins=length_bins(values, ours, theirs),
        score_low=low,
        score_high=high,
    )


def score_interval(values: Floats, differences: Floats, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the score at equal lengths by the bootstrap over prompts: the 2.5 % and 97.5 %
    quantiles of `RESAMPLES` fits. Values in [0, 1] and differences of lengths have shape [prompts]."""
    generator, fits = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        drawn = generator.integers(len(values), size=len(values))
        fits.append(logistic_fit(values[drawn], standardised(differences[drawn]))[0])
    low, high = np.quantile(sigmoid(np.array(fits)), (0.025, 0.975))
    return float(low), float(high)


def standardised(differences: Floats) -> Floats:
    """Return AlpacaEval 2's length feature: tanh of the differences in units of their standard deviation. Shape
    [prompts]; zeros when all differences are equal."""
    scale = float(differences.std())
    return np.tanh(differences / scale) if scale > 0 else np.zeros_like(differences)


def logistic_fit(values: Floats, feature: Floats) -> tuple[float, float]:
    """Return intercept and coefficient of a logistic regression of values in [0, 1] on one feature, both of shape [n],
    with the prior `RIDGE`. Newton's method; a step that does not help is halved."""
    design = np.stack([np.ones_like(feature), feature], axis=1)

    def objective(weights: Floats) -> float:
        logits = design @ weights
        return float((np.logaddexp(0, logits) - values * logits).sum() + weights @ RIDGE @ weights / 2)

    weights = np.zeros(2)
    for _ in range(NEWTON_STEPS):
        shares = sigmoid(design @ weights)
        gradient = design.T @ (shares - values) + RIDGE @ weights
        hessian = (design * (shares * (1 - shares))[:, None]).T @ design + RIDGE
        step = np.linalg.solve(hessian, gradient)
        while objective(weights - step) > objective(weights) + 1e-12:
            step = step / 2
        weights = weights - step
        if np.abs(step).max() < 1e-10:
            break
    return float(weights[0]), float(weights[1])


def sigmoid(logits: Floats) -> Floats:
    """Return 1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(0, -logits))


def length_bins(values: Floats, ours: Sequence[int], theirs: Sequence[int]) -> tuple[LengthBin, ...]:
    """Return the score and its Wilson interval where our response is shorter, similar and longer."""
    members: dict[str, list[float]] = {"shorter": [], "similar": [], "longer": []}
    for value, mine, its in zip(values.tolist(), ours, theirs, strict=True):
        close = abs(mine - its) <= SIMILAR * max(mine, its)
        members["similar" if close else "shorter" if mine < its else "longer"].append(value)
    return tuple(
        LengthBin(name, len(scores), fmean(scores), *wilson_interval(fmean(scores), len(scores)))
        for name, scores in members.items()
        if scores
    )
