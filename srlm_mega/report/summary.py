"""The final table of a run, `summary.json`, built from the stages that are finished."""

from dataclasses import dataclass
from pathlib import Path

import orjson

from srlm_mega.config.file import load_config
from srlm_mega.evaluation.results import JudgeMetrics, ModelEvaluation
from srlm_mega.records import parse_line
from srlm_mega.run.files import write_atomic
from srlm_mega.run.plan import Stage, plan
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.stage_kinds import EVALUATION, PAIRS

ABSENT = "–"


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """One row of the table, with fields of ModelEvaluation. `pairs` is the number of pairs that the model's DPO trained
    on, None for a model without DPO (M1)."""

    quality_sampled: float | None
    quality_greedy: float | None
    win_vs_m1: float | None
    tie_vs_m1: float | None
    loss_vs_m1: float | None
    judge: JudgeMetrics
    judge_single: JudgeMetrics
    mean_length: float
    pairs: int | None


@dataclass(frozen=True, slots=True)
class Summary:
    """Table of a run: `models` by name, M1 first, and `seconds` by stage, in the order of the loop."""

    models: dict[str, ModelSummary]
    seconds: dict[str, float]

    @property
    def has_ground_truth(self) -> bool:
        """True when the quality of any model could be measured."""
        return any(row.quality_sampled is not None for row in self.models.values())


def build_summary(run: Path) -> Summary:
    """Build the table of everything that is finished in a run folder."""
    folder = RunDir(run)
    stages = plan(load_config(folder.config_file))
    finished = {stage: manifest for stage in stages if (manifest := folder.manifest(stage.name)) is not None}
    models = {stage.model: _model_summary(folder, stage) for stage in finished if stage.kind is EVALUATION}
    return Summary(models, {stage.name: manifest.seconds for stage, manifest in finished.items()})


def write_summary(run: Path) -> Summary:
    """Write `summary.json` and return its content."""
    summary = build_summary(run)
    write_atomic(RunDir(run).summary_file, orjson.dumps(summary, option=orjson.OPT_INDENT_2))
    return summary


def _model_summary(folder: RunDir, stage: Stage) -> ModelSummary:
    content = (folder.output(stage.name) / "evaluation.json").read_bytes()
    evaluation = parse_line(ModelEvaluation, content)
    pairs = folder.manifest(PAIRS.of(stage.round))
    return ModelSummary(
        quality_sampled=evaluation.quality_sampled,
        quality_greedy=evaluation.quality_greedy,
        win_vs_m1=evaluation.win_vs_m1,
        tie_vs_m1=evaluation.tie_vs_m1,
        loss_vs_m1=evaluation.loss_vs_m1,
        judge=evaluation.judge,
        judge_single=evaluation.judge_single,
        mean_length=evaluation.mean_length,
        pairs=None if pairs is None else pairs.rows,
    )


def findings(summary: Summary) -> list[str]:
    """Return the main results in sentences; empty before the first evaluation."""
    if not summary.models:
        return []
    rows = list(summary.models.items())
    (first, m1), (last, newest) = rows[0], rows[-1]
    sentences = []
    if newest.quality_sampled is not None and m1.quality_sampled is not None:
        change = movement(m1.quality_sampled, newest.quality_sampled, 2)
        sentences.append(f"Sampled quality {change} of 5 by ground truth{_span(first, last)}.")
    if newest.win_vs_m1 is not None:
        sentences.append(
            f"Against M1 on the same prompts, {last} wins {percent(newest.win_vs_m1)}, "
            f"ties {percent(newest.tie_vs_m1)} and loses {percent(newest.loss_vs_m1)}."
        )
    accuracy, before = newest.judge.pair_acc_half, m1.judge.pair_acc_half
    if accuracy is not None and before is not None:
        sentences.append(
            f"Judge accuracy (ties count half) {movement(100 * before, 100 * accuracy, 1)}%{_span(first, last)}; "
            f"{last} ties {percent(newest.judge.tie_rate)} of the pairs it judges."
        )
    return sentences


def movement(first: float, last: float, digits: int) -> str:
    """Return 'rises from 3.27 to 4.68', or 'is 4.68' if the rounded numbers are equal."""
    before, after = f"{first:.{digits}f}", f"{last:.{digits}f}"
    if before == after:
        return f"is {after}"
    return f"{'rises' if last > first else 'falls'} from {before} to {after}"


def decimal(value: float | None, digits: int = 2) -> str:
    """Return a number with that many decimals, a dash for None."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def percent(share: float | None, digits: int = 0) -> str:
    """Return a share as a percentage, a dash for None."""
    return ABSENT if share is None else f"{100 * share:.{digits}f}%"


def _span(first: str, last: str) -> str:
    return f" ({first})" if first == last else f" ({first} to {last})"
