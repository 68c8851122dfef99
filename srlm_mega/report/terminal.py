"""The final table for a terminal of 80 columns."""

from rich import box
from rich.table import Table
from rich.text import Text

from srlm_mega.evaluation.intervals import Interval
from srlm_mega.report.headlines import ACCURACY, QUALITY, Scale, findings, table_note
from srlm_mega.report.summary import ABSENT, ModelSummary, Summary, decimal, percent

SCORE = Scale(100, 0, "%")


def summary_table(summary: Summary) -> Table:
    """Render one row per model, the newest in bold, with intervals below. Without ground truth the columns that need it
    make room for the share of single judgements with a score, and the pairs' mean difference in score."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, collapse_padding=True, pad_edge=False, header_style="dim")
    table.caption_justify, table.caption_style = "left", ""
    table.add_column("", no_wrap=True)
    truth_columns = (
        ["quality\nsampled", "quality\ngreedy", "win/tie/loss\nvs M1, %"] if summary.has_ground_truth else []
    )
    judge_columns = ["judge\nacc. %", "untied\nacc. %", "judge\nties %"]
    judge_columns += [] if summary.has_ground_truth else ["read\nscores %"]
    gap_columns = [] if summary.has_ground_truth else ["score\ngap"]
    for header in (*truth_columns, *judge_columns, "length\ntokens", "\npairs", *gap_columns):
        table.add_column(header, justify="right", no_wrap=True)
    for name, row in summary.models.items():
        newest = name == list(summary.models)[-1]
        table.add_row(Text(name), *_cells(row, summary.has_ground_truth), style="bold" if newest else "")
    sentences = [table_note(summary), *findings(summary)] if summary.models else ["No model is evaluated yet."]
    table.caption = Text("\n".join(sentences))
    return table


def _cells(row: ModelSummary, has_ground_truth: bool) -> list[Text]:
    found, judge = row.intervals, row.judge
    failed = row.judge_single.parse_failure
    read = None if failed is None else 1 - failed
    accuracy, untied, ties, scored = (
        Text(percent(share, 1).removesuffix("%"))
        for share in (judge.pair_acc_half, judge.pair_acc_untied, judge.tie_rate, read)
    )
    truth = [
        _with_interval(Text(decimal(row.quality_sampled)), found.quality_sampled, QUALITY),
        _with_interval(Text(decimal(row.quality_greedy)), found.quality_greedy, QUALITY),
        _with_interval(_outcomes(row), found.score_vs_m1, SCORE, "score "),
    ]
    return [
        *(truth if has_ground_truth else []),
        _with_interval(accuracy, found.judge_accuracy, ACCURACY),
        untied,
        ties,
        *([] if has_ground_truth else [scored]),
        Text(decimal(row.mean_length, 1)),
        Text(ABSENT if row.pairs is None else f"{row.pairs}"),
        *([] if has_ground_truth else [Text(decimal(row.mean_gap))]),
    ]


def _with_interval(figure: Text, interval: Interval | None, scale: Scale, label: str = "") -> Text:
    """Render a figure and, below it, its interval."""
    return figure if interval is None else Text.assemble(figure, (f"\n{label}{scale.bounds(interval)}", "dim not bold"))


def _outcomes(row: ModelSummary) -> Text:
    """Render shares of wins (green), ties and losses (red), a dash for M1."""
    if row.win_vs_m1 is None:
        return Text(ABSENT)
    win, tie, loss = (percent(share).removesuffix("%") for share in (row.win_vs_m1, row.tie_vs_m1, row.loss_vs_m1))
    return Text.assemble((win, "green"), "/", tie, "/", (loss, "red"))
