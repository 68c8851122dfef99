"""The final table of a run, `summary.json`, built from the stages that are finished."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from srlm_mega.config.file import load_config
from srlm_mega.evaluation.intervals import (
    CHANCE,
    Interval,
    PromptShares,
    estimate,
    of_score,
    paired_change,
    quality_shares,
    read_accuracy_shares,
)
from srlm_mega.evaluation.results import EvaluationSample, JudgeMetrics, ModelEvaluation
from srlm_mega.records import parse_line, read_jsonl
from srlm_mega.run.files import write_atomic
from srlm_mega.run.plan import plan
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.stage_kinds import DPO, EVALUATION, PAIRS, REFERENCE

ABSENT = "–"


@dataclass(frozen=True, slots=True)
class ModelIntervals:
    """A model's main figures with their 95 % intervals over held-out prompts; None for a figure that it does not have.
    `judge_accuracy` is pair_acc_half; `score_vs_m1` counts a tie as one half. The changes are from the first model with
    that figure, on the same prompts, and None for that model itself."""

    quality_sampled: Interval | None
    quality_greedy: Interval | None
    score_vs_m1: Interval | None
    judge_accuracy: Interval | None
    quality_change: Interval | None
    judge_accuracy_change: Interval | None


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """One row of the table, with fields of ModelEvaluation. `pairs` is the number of pairs that the model's DPO trained
    on, without those that were too long; `mean_gap` their mean difference in score; `logprob_difference_mean` and
    `logprob_difference_max` sampler against trainer on them, in nats per token, None where it was not measured. All are
    None for a model without DPO (M1)."""

    quality_sampled: float | None
    quality_greedy: float | None
    win_vs_m1: float | None
    tie_vs_m1: float | None
    loss_vs_m1: float | None
    judge: JudgeMetrics
    judge_single: JudgeMetrics
    mean_length: float
    pairs: int | None
    mean_gap: float | None
    logprob_difference_mean: float | None
    logprob_difference_max: float | None
    intervals: ModelIntervals


@dataclass(frozen=True, slots=True)
class Summary:
    """Table of a run: `models` by name, in order, and `seconds` by stage, in the order of the loop. `chance` is the
    accuracy of a judge that guesses, and the score of a model against its equal."""

    models: dict[str, ModelSummary]
    seconds: dict[str, float]
    chance: float = CHANCE

    @property
    def has_ground_truth(self) -> bool:
        """True when the quality of any model could be measured."""
        return any(row.quality_sampled is not None for row in self.models.values())


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A model's evaluation with its figures by prompt. `judged` is None where an older version kept none."""

    evaluation: ModelEvaluation
    sampled: PromptShares
    greedy: PromptShares
    judged: PromptShares | None

    @classmethod
    def read(cls, folder: Path, judgements: int) -> "Evaluated":
        """Read an evaluation's output; the judge's score is the mean of so many judgements."""
        samples = list(read_jsonl(folder / "samples.jsonl", EvaluationSample))
        return cls(
            parse_line(ModelEvaluation, (folder / "evaluation.json").read_bytes()),
            quality_shares(samples),
            quality_shares(samples, greedy=True),
            read_accuracy_shares(folder, judgements),
        )


def build_summary(run: Path) -> Summary:
    """Build the table of everything that is finished in a run folder."""
    folder = RunDir(run)
    config = load_config(folder.config_file)
    finished = {stage: manifest for stage in plan(config) if (manifest := folder.manifest(stage.name)) is not None}
    pairs = {stage.model: manifest.rows for stage, manifest in finished.items() if stage.kind is DPO}
    evaluated: dict[str, Evaluated] = {}
    models = {}
    for stage in finished:
        if stage.kind is EVALUATION:
            one = Evaluated.read(folder.output(stage.name), config.judge.n)
            parts = [PAIRS, REFERENCE] if stage.model in pairs else []
            made = [manifest for kind in parts if (manifest := folder.manifest(kind.of(stage.round))) is not None]
            counts = {key: value for manifest in made for key, value in manifest.counts.items()}
            models[stage.model] = _model_summary(one, list(evaluated.values()), pairs.get(stage.model), counts)
            evaluated[stage.model] = one
    return Summary(models, {stage.name: manifest.seconds for stage, manifest in finished.items()})


def write_summary(run: Path) -> Summary:
    """Write `summary.json` and return its content."""
    summary = build_summary(run)
    write_atomic(RunDir(run).summary_file, orjson.dumps(summary, option=orjson.OPT_INDENT_2))
    return summary


def _model_summary(
    one: Evaluated, before: Sequence[Evaluated], pairs: int | None, counts: Mapping[str, float]
) -> ModelSummary:
    evaluation = one.evaluation
    first = next((other for other in before if other.sampled), None)
    return ModelSummary(
        quality_sampled=evaluation.quality_sampled,
        quality_greedy=evaluation.quality_greedy,
        win_vs_m1=evaluation.win_vs_m1,
        tie_vs_m1=evaluation.tie_vs_m1,
        loss_vs_m1=evaluation.loss_vs_m1,
        judge=evaluation.judge,
        judge_single=evaluation.judge_single,
        mean_length=evaluation.mean_length,
        pairs=pairs,
        mean_gap=counts.get("mean_gap"),
        logprob_difference_mean=counts.get("logprob_difference_mean"),
        logprob_difference_max=counts.get("logprob_difference_max"),
        intervals=ModelIntervals(
            quality_sampled=estimate(one.sampled),
            quality_greedy=estimate(one.greedy),
            score_vs_m1=of_score(evaluation.against_m1),
            judge_accuracy=_judge_accuracy(one),
            quality_change=None if first is None else paired_change(first.sampled, one.sampled),
            judge_accuracy_change=_judge_accuracy_change(before, one),
        ),
    )


def _judge_accuracy(one: Evaluated) -> Interval | None:
    accuracy = one.evaluation.judge.pair_acc_half
    return estimate(one.judged) if one.judged is not None else None if accuracy is None else Interval(accuracy)


def _judge_accuracy_change(before: Sequence[Evaluated], one: Evaluated) -> Interval | None:
    last = one.evaluation.judge.pair_acc_half
    for first in before:
        accuracy = first.evaluation.judge.pair_acc_half
        if accuracy is not None and last is not None:
            if first.judged is None or one.judged is None:
                return Interval(last - accuracy)
            return paired_change(first.judged, one.judged)
    return None


def decimal(value: float | None, digits: int = 2) -> str:
    """Return a number with that many decimals, a dash for None."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def percent(share: float | None, digits: int = 0) -> str:
    """Return a share as a percentage, a dash for None."""
    return ABSENT if share is None else f"{100 * share:.{digits}f}%"
