"""Health of a round before training: figures of its data, and of sampler against trainer, each with its limits."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import orjson
from pydantic import with_config

from srlm_mega.config.rounds import LOGPROB_LIMITS, HealthConfig, Limit
from srlm_mega.config.training import Precision
from srlm_mega.evaluation.judge_metrics import ratio
from srlm_mega.evaluation.results import ModelEvaluation
from srlm_mega.judging.pair_counts import PairCounts
from srlm_mega.records import STRICT, parse_line
from srlm_mega.run.logs import read_state
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.stage_kinds import CANDIDATES, HEALTH, PAIRS, REFERENCE

State = Literal["fine", "warn", "stop", "unknown"]


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class HealthFigure:
    """One figure and its limits. Without a measurement, the value is None and the state `unknown` stops nothing. NaN,
    which JSON has as null too, is beyond every limit."""

    value: float | None
    warn: float | None
    stop: float | None
    state: State


@with_config(STRICT)
@dataclass(frozen=True, slots=True)
class RoundHealth:
    """Content of health.json: figures by their key in the configuration's section health. `state` is the worst of
    theirs, unknown ones left out."""

    round: int
    state: Literal["fine", "warn", "stop"]
    figures: dict[str, HealthFigure]

    @classmethod
    def of(cls, number: int, figures: dict[str, HealthFigure]) -> "RoundHealth":
        """Return the health of round `number` with the state that follows from its figures."""
        states = {figure.state for figure in figures.values()}
        return cls(number, "stop" if "stop" in states else "warn" if "warn" in states else "fine", figures)

    def beyond(self, state: State) -> dict[str, HealthFigure]:
        """Return the figures of that state."""
        return {key: figure for key, figure in self.figures.items() if figure.state == state}


@dataclass(frozen=True, slots=True)
class HealthTable:
    """Table of several rounds' health.json: figures by their key, one per round of `rounds`, None if it has none."""

    rounds: tuple[int, ...]
    rows: dict[str, tuple[HealthFigure | None, ...]]

    def limits(self, key: str) -> HealthFigure:
        """Return the newest round's figure with that key, for its limits."""
        return next(figure for figure in reversed(self.rows[key]) if figure is not None)


def round_health(
    number: int,
    counts: PairCounts,
    now: ModelEvaluation,
    before: ModelEvaluation | None,
    limits: HealthConfig,
    unknown_tokens: float | None = None,
) -> RoundHealth:
    """Return the health of round `number`, whose model is `now`; `before` is the model before it, None in round 1.
    `unknown_tokens` is the share in the round's prompts. Causes come before what follows from them."""
    entropy = counts.score_entropy if counts.judgements > counts.unparsed else None
    longer = ratio(counts.mean_chosen_length, counts.mean_rejected_length)
    growth = None if before is None else ratio(now.mean_length, before.mean_length)
    figures = {
        "unknown_tokens": figure(unknown_tokens, limits.unknown_tokens),
        "truncation": figure(ratio(counts.truncated, counts.candidates), limits.truncation),
        "duplicates": figure(ratio(counts.duplicates, counts.candidates), limits.duplicates),
        "judge_truncation": figure(ratio(counts.judgements_truncated, counts.judgements), limits.judge_truncation),
        "parse_failure": figure(ratio(counts.unparsed, counts.judgements), limits.parse_failure),
        "tie_rate": figure(ratio(counts.tied, counts.prompts - counts.too_few), limits.tie_rate),
        "score_entropy": figure(entropy, limits.score_entropy, low_is_bad=True),
        "chosen_length": figure(longer, limits.chosen_length),
        "length_growth": figure(growth, limits.length_growth),
        "agreement_drop": figure(agreement_drop(now, before), limits.agreement_drop),
    }
    return RoundHealth.of(number, figures)


def sampler_health(
    number: int, differences: Sequence[float], limits: HealthConfig, precision: Precision
) -> RoundHealth:
    """Return the health of round `number` by the `differences` of sampler and trainer, unknown where there is none.
    `precision` is the coarser one of the two."""
    mean, largest = (fmean(differences), max(differences)) if differences else (None, None)
    auto_mean, auto_largest = LOGPROB_LIMITS[precision]
    figures = {
        "logprob_difference_mean": figure(mean, limits.logprob_difference_mean.resolved(auto_mean)),
        "logprob_difference_max": figure(largest, limits.logprob_difference_max.resolved(auto_largest)),
    }
    return RoundHealth.of(number, figures)


def figure(value: float | None, limit: Limit, low_is_bad: bool = False) -> HealthFigure:
    """Return a value with its limits and its state: a value on a limit is still fine."""

    def beyond(bound: float | None) -> bool:
        return value is not None and bound is not None and not (value >= bound if low_is_bad else value <= bound)

    state: State = (
        "unknown" if value is None else "stop" if beyond(limit.stop) else "warn" if beyond(limit.warn) else "fine"
    )
    return HealthFigure(value, limit.warn, limit.stop, state)


def pair_counts(run: RunDir, number: int) -> PairCounts | None:
    """Return the counts of a round whose pairs are made, else None."""
    made = run.manifest(PAIRS.of(number))
    return None if made is None else parse_line(PairCounts, orjson.dumps(made.counts))


def unknown_share(run: RunDir, number: int) -> float | None:
    """Return the share of unknown tokens in a round's prompts; None when its candidates do not say."""
    made = run.manifest(CANDIDATES.of(number))
    counts = {} if made is None else made.counts
    return ratio(counts.get("unknown_tokens", 0), counts.get("prompt_tokens", 0))


def agreement_drop(now: ModelEvaluation, before: ModelEvaluation | None) -> float | None:
    """Return the fall in pairwise accuracy on EFT-eval, ties counting half: with ties left out, a judge that ties more
    would look better. None in round 1, and without held-out rankings."""
    if before is None or now.judge.pair_acc_half is None or before.judge.pair_acc_half is None:
        return None
    return before.judge.pair_acc_half - now.judge.pair_acc_half


def health_table(run: RunDir, rounds: int) -> HealthTable | None:
    """Return the table of all rounds that have a health.json, None when there is none."""
    found = {number: health for number in range(1, rounds + 1) if (health := read_health(run, number)) is not None}
    keys = dict.fromkeys(key for health in found.values() for key in health.figures)
    if not keys:
        return None
    return HealthTable(tuple(found), {key: tuple(one.figures.get(key) for one in found.values()) for key in keys})


def read_health(run: RunDir, number: int) -> RoundHealth | None:
    """Read a round's figures from the health.json of its reference, which may explain the others, and of its data. Of a
    round that one of them stopped, it is in the partial stage. None without any."""
    figures: dict[str, HealthFigure] = {}
    for stage in (REFERENCE.of(number), HEALTH.of(number)):
        for path in (run.partial(stage) / "health.json", run.output(stage) / "health.json"):
            if (found := read_state(path, RoundHealth)) is not None:
                figures |= found.figures
    return RoundHealth.of(number, figures) if figures else None
