"""`srlm compare`: the final tables of several runs in one, as Markdown; for seeds and controls."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from srlm_mega.errors import CannotContinue
from srlm_mega.evaluation.intervals import Interval
from srlm_mega.report.headlines import ACCURACY, QUALITY, Scale, findings
from srlm_mega.report.summary import ModelSummary, build_summary
from srlm_mega.tools.bench_record import markdown

HEADER = (
    "run", "model", "sampled", "greedy", "win / tie / loss vs M1", "score", "judge acc.", "untied", "ties", "parsed",
    "prompts", "pairs",
)  # fmt: skip
SHARE = Scale(1, 3, "")


def comparison(runs: Sequence[Path]) -> str:
    """Return one row per run and model, each run's findings, and the mean change over the runs from the first model to
    the last. Runs of the same name are told apart by their paths. CannotContinue when none has an evaluated model."""
    names = Counter(run.name for run in runs)
    tables = {run.name if names[run.name] == 1 else str(run): build_summary(run) for run in runs}
    if not any(table.models for table in tables.values()):
        raise CannotContinue(
            f"no model of {', '.join(map(str, runs))} is evaluated yet, so there is nothing to compare: `srlm run` "
            "makes the evaluations, `srlm status RUN` says how far it is"
        )
    rows = [(run, name, *cells(row)) for run, table in tables.items() for name, row in table.models.items()]
    newest = [list(table.models.values())[-1].intervals for table in tables.values() if table.models]
    quality = mean_gain([one.quality_change for one in newest], QUALITY)
    judge = mean_gain([one.judge_accuracy_change for one in newest], ACCURACY)
    return "\n\n".join(
        [
            markdown([HEADER, *rows]),
            "In brackets: 95 % intervals over prompts (of responses / of the judge). Chance is .500 for both shares.",
            *(f"{run}: {' '.join(findings(table))}" for run, table in tables.items() if table.models),
            f"First to last model, mean of {len(newest)} run(s): sampled quality {quality}, judge accuracy {judge}.",
        ]
    )


def mean_gain(changes: Sequence[Interval | None], scale: Scale) -> str:
    """Return the mean change over the runs that measured it with its range, or a dash. Several seeds show how much one
    run's figure depends on its seed, which the interval over prompts does not."""
    gains = [change.value for change in changes if change is not None]
    if not gains:
        return "-"
    spread = f" (runs {scale.number(min(gains), '+')} to {scale.number(max(gains), '+')})" if len(gains) > 1 else ""
    return f"{scale.number(fmean(gains), '+')}{scale.change_unit}{spread}"


def cells(row: ModelSummary) -> tuple[str, ...]:
    """Return the figures of one model as text; a dash where nothing was measured."""
    against = [share(value) for value in (row.win_vs_m1, row.tie_vs_m1, row.loss_vs_m1)]
    failures, found = row.judge.parse_failure, row.intervals
    over = (found.quality_sampled, found.judge_accuracy)
    return (
        bracketed(found.quality_sampled, QUALITY),
        bracketed(found.quality_greedy, QUALITY),
        " / ".join(against) if row.win_vs_m1 is not None else "-",
        bracketed(found.score_vs_m1, SHARE),
        bracketed(found.judge_accuracy, SHARE),
        share(row.judge.pair_acc_untied),
        share(row.judge.tie_rate),
        share(None if failures is None else 1 - failures),
        " / ".join("-" if one is None or one.n is None else str(one.n) for one in over),
        "-" if row.pairs is None else str(row.pairs),
    )


def bracketed(interval: Interval | None, scale: Scale) -> str:
    """Return '3.27 [3.14, 3.40]', '.817 [unknown]', or a dash; shares without the leading zero."""
    if interval is None:
        return "-"
    text = f"{scale.number(interval.value)} [{scale.bounds(interval, ', ')}]"
    return text.replace("0.", ".") if scale is SHARE else text


def share(value: float | None) -> str:
    """Format with three decimals, and without the leading zero, as the field's tables do."""
    return "-" if value is None else f"{value:.3f}".removeprefix("0") if value < 1 else f"{value:.3f}"
