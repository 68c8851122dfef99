"""Figures of the report; their style is in drawing.py."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from srlm_mega.evaluation.intervals import CHANCE, Interval
from srlm_mega.report.costs import StageCost
from srlm_mega.report.drawing import MODEL_COLORS, MUTED, PAPER, RULE, Plot, legend, model_color, plot
from srlm_mega.report.headlines import ACCURACY, QUALITY, Scale, compared
from srlm_mega.report.round_parts import DpoStep
from srlm_mega.report.summary import ModelSummary
from srlm_mega.run.plan import Stage
from srlm_mega.run.stage_kinds import Part, model_name, model_number

Figures = Mapping[str, Interval | None]
SMOOTHING_WINDOWS = 12  # a running mean spans a twelfth of a run: 5 of 60 steps
DRAWN_STEPS = 500  # approximate maximum of a curve's points in the page
PART_COLORS = {
    Part.SEED: RULE,
    Part.PROMPTS: MODEL_COLORS[0],
    Part.CANDIDATES: MODEL_COLORS[1],
    Part.JUDGEMENTS: MODEL_COLORS[2],
    Part.PAIRS: RULE,
    Part.REFERENCE: MODEL_COLORS[5],
    Part.TRAINING: MODEL_COLORS[4],
    Part.EVALUATION: MODEL_COLORS[3],
    Part.OTHER: MUTED,
}


def quality_plot(models: Mapping[str, ModelSummary]) -> Plot:
    """Plot the mean ground-truth quality per model, with its interval."""
    sampled = {name: row.intervals.quality_sampled for name, row in models.items()}
    greedy = {name: row.intervals.quality_greedy for name, row in models.items()}

    def paint(axes: Axes) -> None:
        _two_lines(axes, "sampled", sampled, "greedy", greedy, QUALITY)
        axes.set(ylim=(0, 5.6), ylabel="quality (criteria met, 0–5)")

    change, evidence = compared(sampled, list(models.values())[-1].intervals.quality_change, QUALITY)
    note = f"{evidence}. Mean by ground truth, which the loop never sees. Bars: 95% intervals."
    return plot("quality", f"Sampled quality {change}", note, paint)


def judge_plot(models: Mapping[str, ModelSummary]) -> Plot:
    """Plot the pairwise accuracy of each model as the judge of held-out ranked replies, its interval, and chance."""
    half = {name: row.intervals.judge_accuracy for name, row in models.items()}
    untied = {
        name: None if row.judge.pair_acc_untied is None else Interval(row.judge.pair_acc_untied)
        for name, row in models.items()
    }

    def paint(axes: Axes) -> None:
        lowest = _two_lines(axes, "ties count half", half, "untied", untied, ACCURACY)
        axes.axhline(100 * CHANCE, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.text(-0.45, 100 * CHANCE + 0.7, "chance", color=MUTED, fontsize=8, va="bottom")
        axes.set(ylim=(min(45.0, lowest) - 2, 102), ylabel="pairs in order (%)")

    change, evidence = compared(half, list(models.values())[-1].intervals.judge_accuracy_change, ACCURACY)
    note = f"{evidence}. Bars: 95% intervals. Untied (drawn without): pairs with equal scores are left out."
    return plot("judge", f"Judge accuracy {change}", note, paint)


def scores_plot(scores: Mapping[int, Mapping[float, int]]) -> Plot:
    """Plot the distribution of scores by round; `scores` counts them, and every round has some."""
    points = range(math.ceil(max(5, *(score for counted in scores.values() for score in counted))) + 1)

    def paint(axes: Axes) -> None:
        width = 0.84 / len(scores)
        for position, (number, counted) in enumerate(scores.items()):
            edges = np.arange(len(points) + 1) - 0.5
            counts, _ = np.histogram(list(counted), bins=edges, weights=list(counted.values()))
            offset = (position - (len(scores) - 1) / 2) * width
            share = 100 * counts / sum(counted.values())
            label = f"round {number}"
            axes.bar(np.array(points) + offset, share, 0.92 * width, color=model_color(number), label=label)
        axes.set(xticks=points if len(points) < 20 else points[::10], xlabel="score (points)", ylabel="judgements (%)")
        axes.tick_params(axis="x", length=0)
        legend(axes)

    means = {
        f"round {number}": f"{sum(score * count for score, count in counted.items()) / sum(counted.values()):.2f}"
        for number, counted in scores.items()
    }
    title = f"The judges' mean score is {_first_and_last(means)}"
    return plot("scores", title, "Share of a round's judgements with each score, of those that have one.", paint)


def lengths_plot(name: str, what: str, unit: str, lengths: Mapping[str, Mapping[int, int]]) -> Plot:
    """Plot quantiles of the lengths of each model's texts. `lengths` counts texts by length; every model has some."""
    quantiles = {
        model: np.quantile(np.repeat(list(counted), list(counted.values())), (0.05, 0.25, 0.5, 0.75, 0.95))
        for model, counted in lengths.items()
    }
    longest = max(1.0, *(values[-1] for values in quantiles.values()))

    def paint(axes: Axes) -> None:
        for row, (model, (p5, p25, p50, p75, p95)) in enumerate(quantiles.items()):
            color = model_color(model_number(model))
            axes.plot((p5, p95), (row, row), color=color, linewidth=1.2)
            axes.barh(row, max(p75 - p25, 0.02), 0.34, p25, color=color)
            axes.plot(p50, row, "o", color=color, markerfacecolor=PAPER, markeredgewidth=1.6, markersize=7)
        axes.set_yticks(range(len(lengths)), list(lengths))
        axes.set(xlabel=f"length of a {what} ({unit})", xlim=(0, 1.04 * longest), ylim=(len(lengths) - 0.4, -0.6))
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")

    title = f"The median {what} has {_first_and_last({model: f'{p[2]:g}' for model, p in quantiles.items()})} {unit}"
    return plot(name, title, "Dot: median. Bar: the middle half. Line: from the 5th to the 95th percentile.", paint)


def dpo_plots(steps: Mapping[int, Sequence[DpoStep]]) -> list[Plot]:
    """Plot the curves of each round's DPO: loss, margins, accuracy, and the rewards of both sides."""
    loss, margins, accuracy, chosen, rejected = (
        {number: [pick(step) for step in curve] for number, curve in steps.items()}
        for pick in (
            lambda step: step.loss,
            lambda step: step.margin,
            lambda step: 100 * step.accuracy,
            lambda step: step.chosen,
            lambda step: step.rejected,
        )
    )

    def paint_loss(axes: Axes) -> None:
        _curves(axes, loss, steps)
        axes.axhline(math.log(2), color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.annotate(
            "ln 2: no preference", (1, math.log(2)), (-2, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", color=MUTED, fontsize=8,
        )  # fmt: skip
        axes.margins(y=0.12)  # space for the label above the line
        axes.set(xlabel="optimiser step", ylabel="DPO loss (nats)")

    def paint_margins(axes: Axes) -> None:
        _curves(axes, margins, steps)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set(xlabel="optimiser step", ylabel="reward margin (nats)")

    def paint_accuracy(axes: Axes) -> None:
        _curves(axes, accuracy, steps)
        axes.set(ylim=(0, 103), xlabel="optimiser step", ylabel="pairs in order (%)")

    def paint_rewards(axes: Axes) -> None:
        _curves(axes, chosen, steps)
        _curves(axes, rejected, steps, line="--", named=False)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set(xlabel="optimiser step", ylabel="reward (nats)")

    margin_note = "How much more the policy prefers chosen over rejected than its reference does, times beta."
    reward_note = "Solid: chosen. Dashed: rejected. Both may fall while their difference grows."
    return [
        plot("loss", f"DPO loss ends at {_final(loss)}",
             "At ln 2 the policy equals its reference. Bold: running mean.", paint_loss),
        plot("margins", f"Reward margins end at {_final(margins)}", margin_note, paint_margins),
        plot("accuracy", f"Pairs in the right order end at {_final(accuracy, 0)} %",
             "Share of a batch's pairs whose chosen response has the larger reward.", paint_accuracy),
        plot("rewards", f"The reward of chosen responses ends at {_final(chosen)}", reward_note, paint_rewards),
    ]  # fmt: skip


def time_plot(costs: Sequence[StageCost]) -> Plot:
    """Plot the wall-clock time of each round by part of the loop."""
    rows: dict[str, dict[Part, float]] = {}
    total: dict[Part, float] = {}
    for cost in costs:
        for sums in (rows.setdefault(row_of(cost.stage), {}), total):
            part = cost.stage.kind.part
            sums[part] = sums.get(part, 0.0) + cost.seconds
    longest = max(sum(row.values()) for row in rows.values())  # decides the axis' unit
    unit, seconds = ("h", 3600.0) if longest > 7200 else ("min", 60.0) if longest > 120 else ("s", 1.0)

    def paint(axes: Axes) -> None:
        for position, part in enumerate(Part):
            if part in total:
                # A bar begins where those of the earlier parts end.
                before = [sum(row.get(one, 0.0) for one in list(Part)[:position]) / seconds for row in rows.values()]
                widths = [row.get(part, 0.0) / seconds for row in rows.values()]
                axes.barh(range(len(rows)), widths, 0.5, before, color=PART_COLORS[part], label=part)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set(xlabel=f"wall-clock time ({unit})", ylim=(len(rows) - 0.4, -0.6))
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        legend(axes, columns=4)

    most = max(total, key=lambda part: total[part])
    title = f"{most.capitalize()} takes {100 * total[most] / max(1e-9, sum(total.values())):.0f} % of the time"
    return plot("time", title, "Stages of a round; M0, M1 and what they are made from are the start.", paint)


def row_of(stage: Stage) -> str:
    """Return a stage's row in the time plot: 'round 2' includes training and evaluation of M3."""
    return f"round {stage.round}" if stage.round > 0 else "start"


def _two_lines(axes: Axes, solid: str, values: Figures, dotted: str, others: Figures, scale: Scale) -> float:
    """Draw two figures per model with their intervals, each with its number on the side away from the other figure.
    Return the lowest point drawn."""
    names, lowest = list({**values, **others}), math.inf
    for label, line, own, other in ((solid, "-", values, others), (dotted, ":", others, values)):
        at = [(x, figure, other.get(name)) for x, name in enumerate(names) if (figure := own.get(name)) is not None]
        heights = [scale.factor * figure.value for _, figure, _ in at]
        axes.plot([x for x, _, _ in at], heights, line, color=MUTED, linewidth=1.2, label=label, zorder=2)
        for (x, figure, beside), y in zip(at, heights, strict=True):
            color = model_color(model_number(names[x]))
            low = high = y
            if figure.low is not None and figure.high is not None:
                low, high = scale.factor * figure.low, scale.factor * figure.high
                axes.errorbar(x, y, ([y - low], [high - y]), color=color, linewidth=1.2, capsize=6, zorder=2)
            axes.plot(x, y, "o", color=color, markerfacecolor=color if line == "-" else PAPER, zorder=3)
            below = beside is not None and (figure.value, line) < (beside.value, "-:"[line == "-"])
            axes.annotate(
                scale.number(figure.value), (x, low if below else high), (0, -14 if below else 7),
                textcoords="offset points", ha="center",
            )  # fmt: skip
            lowest = min(lowest, low)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.tick_params(axis="x", length=0)
    legend(axes)
    return lowest


def _curves(
    axes: Axes,
    curves: Mapping[int, Sequence[float]],
    steps: Mapping[int, Sequence[DpoStep]],
    line: str = "-",
    named: bool = True,
) -> None:
    """Draw raw values faint and their running mean bold, in the colour of the model that a round trains. Of a long
    curve, every n-th point is drawn."""
    for number, values in curves.items():
        stride = 1 + len(values) // DRAWN_STEPS
        at = [step.step for step in steps[number]][::stride]
        color = model_color(number + 1)
        axes.plot(at, values[::stride], color=color, linewidth=0.8, alpha=0.35)
        name = f"{model_name(number)} → {model_name(number + 1)}" if named else None
        axes.plot(at, running_mean(values)[::stride], line, color=color, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    legend(axes)


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the running mean over each value and those before it, with a window of a twelfth of the run."""
    window = max(1, round(len(values) / SMOOTHING_WINDOWS))
    return [float(np.mean(values[max(0, end - window) : end])) for end in range(1, len(values) + 1)]


def _final(curves: Mapping[int, Sequence[float]], digits: int = 2) -> str:
    """Return the running means at the curves' ends: '0.27 in the first round, 0.25 in the last'."""
    ends = [f"{running_mean(curve)[-1]:.{digits}f}" for curve in curves.values()]
    return ends[0] if len(ends) == 1 else f"{ends[0]} in the first round, {ends[-1]} in the last"


def _first_and_last(figures: Mapping[str, str]) -> str:
    """Return '3.27 (M1) and 3.31 (M3)'. Nothing is compared: the texts of two rounds answer different prompts."""
    ends = [f"{figure} ({name})" for name, figure in figures.items()]
    return ends[0] if len(ends) == 1 else f"{ends[0]} and {ends[-1]}"
