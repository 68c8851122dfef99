"""`srlm compare`: the final tables of several runs in one, as Markdown; for seeds and controls."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from srlm_mega.report.summary import ModelSummary, build_summary
from srlm_mega.tools.bench_record import markdown

HEADER = (
    "run", "model", "sampled", "greedy", "win / tie / loss vs M1", "judge acc.", "untied", "ties", "parsed", "pairs"
)  # fmt: skip


def comparison(runs: Sequence[Path]) -> str:
    """Return one row per run and model, then the mean change over the runs from the first model to the last."""
    tables = {run.name: build_summary(run).models for run in runs}
    rows = [(run, name, *cells(row)) for run, models in tables.items() for name, row in models.items()]
    ends = [(next(iter(models.values())), list(models.values())[-1]) for models in tables.values() if models]
    quality = mean_gain([(first.quality_sampled, last.quality_sampled) for first, last in ends])
    judge = mean_gain([(first.judge.pair_acc_half, last.judge.pair_acc_half) for first, last in ends])
    return (
        f"{markdown([HEADER, *rows])}\n\n"
        f"First to last model, mean of {len(ends)} run(s): sampled quality {quality}, judge accuracy {judge}."
    )


def mean_gain(ends: Sequence[tuple[float | None, float | None]]) -> str:
    """Return the mean change over the runs where both ends were measured, or a dash."""
    gains = [last - first for first, last in ends if first is not None and last is not None]
    return f"{fmean(gains):+.3f}" if gains else "-"


def cells(row: ModelSummary) -> tuple[str, ...]:
    """Return the figures of one model as text; a dash where nothing was measured."""
    against = [share(value) for value in (row.win_vs_m1, row.tie_vs_m1, row.loss_vs_m1)]
    failures = row.judge.parse_failure
    return (
        number(row.quality_sampled),
        number(row.quality_greedy),
        " / ".join(against) if row.win_vs_m1 is not None else "-",
        share(row.judge.pair_acc_half),
        share(row.judge.pair_acc_untied),
        share(row.judge.tie_rate),
        share(None if failures is None else 1 - failures),
        "-" if row.pairs is None else str(row.pairs),
    )


def number(value: float | None) -> str:
    """Format with two decimals."""
    return "-" if value is None else f"{value:.2f}"


def share(value: float | None) -> str:
    """Format with three decimals, and without the leading zero, as the field's tables do."""
    return "-" if value is None else f"{value:.3f}".removeprefix("0") if value < 1 else f"{value:.3f}"
