"""Estimates with their 95 % intervals over prompts, by the bootstrap.

Whole prompts are resampled: replies and replicates of one prompt are not independent. Two models are compared on the
same resampled prompts, so that what is hard for both cancels.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import with_config
from scipy.special import ndtr, stdtrit

from srlm_mega.evaluation.results import JUDGED_PROMPTS, EvaluationSample, JudgedPrompt
from srlm_mega.evaluation.win_rates import FEWEST_PROMPTS, HeadToHead
from srlm_mega.records import STRICT, read_jsonl

CHANCE = 0.5
"""Pairwise accuracy of a judge that guesses, and score of a model against its equal; ties count half in both."""

RESAMPLES = 4000  # an end of an interval then varies by some 0.04 standard errors from one seed to another
BLOCK = 1_000_000  # number of drawn prompts in memory at once
Floats = NDArray[np.float64]
PromptShares = Mapping[str, tuple[float, float]]
"""By prompt id, a part and a whole; the figure is the sum of the parts divided by the sum of the wholes."""


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate over `n` prompts with its 95 % interval. `low` and `high` are None where that is unknown: of fewer
    than six prompts, and of an evaluation that kept no figures per prompt (then `n` is None too)."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    def excludes(self, value: float) -> bool:
        """Tell whether a value is outside the interval; never when the interval is unknown."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


def estimate(shares: PromptShares) -> Interval | None:
    """Return a model's figure with its interval; None without a prompt to average over."""
    table = _table([shares])
    if not table.any():
        return None
    low, high = _ends(bootstrap(table)[:, 0], table)
    return Interval(float(ratios(table.sum(axis=0))[0]), low, high, len(table))


def paired_change(before: PromptShares, after: PromptShares) -> Interval | None:
    """Return the second model's figure minus the first one's, with its interval over the prompts that both were given;
    None where one of them has nothing to average over. Where fewer than six prompts differ, the interval includes 0."""
    shared = [name for name in before if name in after]
    table = _table([{name: shares[name] for name in shared} for shares in (before, after)])
    if not table[:, :, 1].any(axis=0).all():
        return None
    first, second = ratios(table.sum(axis=0))
    resampled = bootstrap(table)
    low, high = _ends(resampled[:, 1] - resampled[:, 0], table)
    if low is not None and high is not None and (table[:, 0] != table[:, 1]).any(axis=1).sum() < FEWEST_PROMPTS:
        low, high = min(low, 0.0), max(high, 0.0)
    return Interval(float(second - first), low, high, len(table))


def bootstrap(table: Floats, seed: int = 0) -> Floats:
    """Return each model's ratio of sums in every resample of the prompts, shape [RESAMPLES, models], from a table of
    parts and wholes of shape [prompts, models, 2]. NaN where the wholes in a resample are all 0."""
    generator, prompts, found = np.random.default_rng(seed), len(table), []
    step = max(1, BLOCK // prompts)
    for first in range(0, RESAMPLES, step):
        drawn = generator.integers(prompts, size=(min(step, RESAMPLES - first), prompts))
        found.append(ratios(table[drawn].sum(axis=1)))
    return np.concatenate(found)


def ratios(sums: Floats) -> Floats:
    """Return parts divided by wholes, which are the last axis; NaN where a whole is 0."""
    found: Floats = np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] > 0)
    return found


def _table(models: Sequence[PromptShares]) -> Floats:
    """Return shape [prompts, models, 2], without the prompts that have nothing to count for any model."""
    rows = [[model[name] for model in models] for name in models[0]]
    table = np.array(rows, dtype=np.float64).reshape(-1, len(models), 2)
    return table[table[:, :, 1].any(axis=1)]


def _ends(resampled: Floats, table: Floats) -> tuple[float | None, float | None]:
    """Return the ends of the 95 % interval, None where a model has too few prompts for one.

    They are the 2.5 % and 97.5 % quantiles, moved outwards as far as Student's t is wider than the normal distribution.
    Alone they are too narrow for few prompts (Hesterberg 2015, "What Teachers Should Know About the Bootstrap").
    """
    prompts = int((table[:, :, 1] > 0).sum(axis=0).min())
    if prompts < FEWEST_PROMPTS:
        return None, None
    tail = float(ndtr(-math.sqrt(prompts / (prompts - 1)) * stdtrit(prompts - 1, 0.975)))
    low, high = np.nanquantile(resampled, (tail, 1 - tail))
    return float(low), float(high)


def quality_shares(samples: Iterable[EvaluationSample], greedy: bool = False) -> PromptShares:
    """Return the true quality of each prompt's response, sampled or greedy; empty without ground truth."""
    found = {one.prompt_id: one.quality_greedy if greedy else one.quality_sampled for one in samples}
    return {name: (float(quality), 1.0) for name, quality in found.items() if quality is not None}


def read_accuracy_shares(evaluation: Path, judgements: int) -> PromptShares | None:
    """Read an evaluation's pairs by prompt, see `accuracy_shares`; None where an older version kept none."""
    path = evaluation / JUDGED_PROMPTS
    return accuracy_shares(read_jsonl(path, JudgedPrompt), judgements) if path.is_file() else None


def accuracy_shares(prompts: Iterable[JudgedPrompt], judgements: int) -> PromptShares:
    """Return each prompt's pairs in the right order, ties as halves, of all its pairs; by means of `judgements`."""
    return {one.prompt_id: (one.right + one.tied / 2, one.pairs) for one in prompts if one.judgements == judgements}


def of_score(result: HeadToHead | None) -> Interval | None:
    """Return a head-to-head's score with its interval, which is Wilson's; None without a result."""
    return None if result is None else Interval(result.score, result.score_low, result.score_high, result.prompts)
