"""The report's figures: matplotlib drawings as inline SVG whose colours are the page's CSS variables.

A figure is drawn in stand-in colours that are then exchanged for `var(--ink)`, `var(--m1)`, ...: the same drawing is
right on dark and on light paper, and its text is the page's own. M1 has one colour everywhere, and so on.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from srlm_mega.report.summary import ModelSummary, model_number, movement

INK, MUTED, RULE, PAPER = "#0000f1", "#0000f2", "#0000f3", "#0000f4"
MODEL_COLORS = ("#0000a1", "#0000a2", "#0000a3", "#0000a4", "#0000a5", "#0000a6")
CSS_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAPER: "var(--paper)",
    **{color: f"var(--m{number})" for number, color in enumerate(MODEL_COLORS, start=1)},
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "srlm",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
}
SCORES = range(6)
LEGEND_COLUMNS = 5
SMOOTHING_WINDOWS = 12  # a running mean spans this part of a run: 5 of 60 steps


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure: its message, the drawing, and how to read it."""

    title: str
    svg: Markup
    note: str


@dataclass(frozen=True, slots=True)
class DpoStep:
    """One optimiser step of a round's DPO. `loss` and `margin` (beta times the difference of log-ratios) in nats."""

    step: int
    loss: float
    margin: float


def quality_plot(models: Mapping[str, ModelSummary]) -> Plot:
    """Mean ground-truth quality per model; every model must have one."""
    sampled = {name: row.quality_sampled for name, row in models.items() if row.quality_sampled is not None}
    greedy = {name: row.quality_greedy for name, row in models.items() if row.quality_greedy is not None}

    def paint(axes: Axes) -> None:
        _two_lines(axes, "sampled", sampled, "greedy", greedy, digits=2)
        axes.set(ylim=(0, 5.25), ylabel="quality (criteria met, 0–5)")

    first, last = _ends(sampled)
    title = f"Sampled quality {movement(first, last, 2)}"
    return _plot("quality", title, "Mean over the held-out prompts, by ground truth that the loop never sees.", paint)


def judge_plot(models: Mapping[str, ModelSummary]) -> Plot:
    """Pairwise accuracy of each model as the judge of held-out ranked replies."""
    half = {name: 100 * row.judge.pair_acc_half for name, row in models.items() if row.judge.pair_acc_half is not None}
    untied = {
        name: 100 * row.judge.pair_acc_untied for name, row in models.items() if row.judge.pair_acc_untied is not None
    }

    def paint(axes: Axes) -> None:
        _two_lines(axes, "ties count half", half, "untied", untied, digits=1)
        axes.axhline(50, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.text(-0.45, 50.7, "chance", color=MUTED, fontsize=8, va="bottom")
        axes.set(ylim=(min([45.0, *half.values(), *untied.values()]) - 2, 102), ylabel="pairs ordered rightly (%)")

    first, last = _ends(half)
    title = f"Judge accuracy {movement(first, last, 1)}%"
    note = "Pairs of held-out replies with known ranks. Untied: pairs the judge scored equally are left out."
    return _plot("judge", title, note, paint)


def scores_plot(scores: Mapping[int, Sequence[float]]) -> Plot:
    """Parsed scores of each round's judgements, by round; scores are 0-5."""

    def paint(axes: Axes) -> None:
        width = 0.84 / len(scores)
        for place, (number, values) in enumerate(scores.items()):
            counts, _ = np.histogram(values, bins=np.arange(len(SCORES) + 1) - 0.5)
            offset = (place - (len(scores) - 1) / 2) * width
            share = 100 * counts / max(1, len(values))
            label = f"round {number}"
            axes.bar(np.array(SCORES) + offset, share, 0.92 * width, color=model_color(number), label=label)
        axes.set(xticks=SCORES, xlabel="score (points)", ylabel="judgements (%)")
        axes.tick_params(axis="x", length=0)
        _legend(axes)

    means = [sum(values) / len(values) for values in scores.values() if values]
    title = f"The judges' mean score {movement(means[0], means[-1], 2)}" if means else "No judgement had a score"
    return _plot("scores", title, "Share of a round's judgements with each score, of those that have one.", paint)


def lengths_plot(lengths: Mapping[str, Sequence[int]]) -> Plot:
    """Length of each model's sampled responses, as quantiles; every model needs at least one response."""
    quantiles = {name: np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)) for name, values in lengths.items()}
    longest = max(1.0, *(values[-1] for values in quantiles.values()))

    def paint(axes: Axes) -> None:
        for place, (name, (p5, p25, p50, p75, p95)) in enumerate(quantiles.items()):
            color = model_color(model_number(name))
            axes.plot((p5, p95), (place, place), color=color, linewidth=1.2)
            axes.barh(place, max(p75 - p25, 0.02), 0.34, p25, color=color)
            axes.plot(p50, place, "o", color=color, markerfacecolor=PAPER, markeredgewidth=1.6, markersize=7)
        axes.set_yticks(range(len(lengths)), list(lengths))
        axes.set(
            xlabel="length of a sampled response (words)", xlim=(0, 1.04 * longest), ylim=(len(lengths) - 0.4, -0.6)
        )
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")

    first, last = _ends({name: float(values[2]) for name, values in quantiles.items()})
    title = f"The median response {_lengthening(first, last)}"
    return _plot(
        "lengths", title, "Dot: median. Bar: the middle half. Line: from the 5th to the 95th percentile.", paint
    )


def loss_plot(steps: Mapping[int, Sequence[DpoStep]]) -> Plot:
    """DPO loss over the steps of each round."""

    def paint(axes: Axes) -> None:
        _curves(axes, {number: [step.loss for step in curve] for number, curve in steps.items()}, steps)
        axes.axhline(math.log(2), color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.annotate(
            "ln 2: no preference", (1, math.log(2)), (-2, -10), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", color=MUTED, fontsize=8,
        )  # fmt: skip
        axes.set(ylim=(0, None), xlabel="optimiser step", ylabel="DPO loss (nats)")
        _legend(axes)

    note = "At ln 2 the policy is no other than its reference. Bold: running mean."
    return _plot(
        "loss", f"DPO loss ends at {_final([[s.loss for s in curve] for curve in steps.values()])}", note, paint
    )


def margins_plot(steps: Mapping[int, Sequence[DpoStep]]) -> Plot:
    """DPO reward margins over the steps of each round."""

    def paint(axes: Axes) -> None:
        _curves(axes, {number: [step.margin for step in curve] for number, curve in steps.items()}, steps)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set(xlabel="optimiser step", ylabel="reward margin (nats)")
        _legend(axes)

    note = "How much more the policy prefers chosen over rejected than its reference does, times beta."
    return _plot(
        "margins",
        f"Reward margins end at {_final([[s.margin for s in curve] for curve in steps.values()])}",
        note,
        paint,
    )


def model_color(number: int) -> str:
    """The stand-in colour of M1, M2, ...; it starts again after the sixth."""
    return MODEL_COLORS[(number - 1) % len(MODEL_COLORS)]


def _two_lines(
    axes: Axes, solid: str, values: Mapping[str, float], dotted: str, others: Mapping[str, float], digits: int
) -> None:
    """Two values per model, each with its number on the side where the other value is not."""
    names = list({**values, **others})
    for label, line, own, other in ((solid, "-", values, others), (dotted, ":", others, values)):
        at = [(names.index(name), value, name) for name, value in own.items()]
        axes.plot([x for x, _, _ in at], [y for _, y, _ in at], line, color=MUTED, linewidth=1.2, label=label, zorder=2)
        for x, y, name in at:
            color = model_color(model_number(name))
            axes.plot(x, y, "o", color=color, markerfacecolor=color if line == "-" else PAPER, zorder=3)
            below = (y, line) < (other.get(name, y), "-:"[line == "-"])
            axes.annotate(
                f"{y:.{digits}f}", (x, y), (0, -14 if below else 7), textcoords="offset points", ha="center"
            )  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.tick_params(axis="x", length=0)
    _legend(axes)


def _curves(axes: Axes, curves: Mapping[int, Sequence[float]], steps: Mapping[int, Sequence[DpoStep]]) -> None:
    """Raw values faint, their running mean bold. A round's curve has the colour of the model it trains."""
    for number, values in curves.items():
        at = [step.step for step in steps[number]]
        color = model_color(number + 1)
        axes.plot(at, values, color=color, linewidth=0.8, alpha=0.35)
        axes.plot(at, running_mean(values), color=color, label=f"M{number} → M{number + 1}")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean of each value and those before it, over a twelfth of the run. The first is the first."""
    window = max(1, round(len(values) / SMOOTHING_WINDOWS))
    return [float(np.mean(values[max(0, end - window) : end])) for end in range(1, len(values) + 1)]


def _final(curves: Sequence[Sequence[float]]) -> str:
    """'0.27 in the first round, 0.25 in the last': running means at the end."""
    first, last = (f"{running_mean(curve)[-1]:.2f}" for curve in (curves[0], curves[-1]))
    return first if len(curves) == 1 else f"{first} in the first round, {last} in the last"


def _ends(values: Mapping[str, float]) -> tuple[float, float]:
    numbers = list(values.values())
    return numbers[0], numbers[-1]


def _lengthening(first: float, last: float) -> str:
    if first == last:
        return f"has {last:g} words"
    return f"{'grows' if last > first else 'shrinks'} from {first:g} to {last:g} words"


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=LEGEND_COLUMNS, fontsize=8, borderpad=0, columnspacing=1.2
    )


def _plot(name: str, title: str, note: str, paint: Callable[[Axes], None]) -> Plot:
    with rc_context(STYLE):
        figure = Figure(figsize=(5.0, 3.1), layout="constrained")
        paint(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Plot(title, _for_page(file.getvalue(), name, title), note)


def _for_page(svg: str, name: str, title: str) -> Markup:
    """The drawing as a part of the page: no prolog and no size, ids that no other figure has, the page's colours."""
    head, body = svg[svg.index("<svg") :].split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head)
    assert view_box is not None, "matplotlib's SVG has no viewBox"
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r' id="', f' id="{name}-', body)
    body = body.replace('xlink:href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    for color, variable in CSS_VARIABLES.items():
        body = body.replace(color, variable)
    return Markup(f'<svg {view_box.group()} role="img" aria-label="{escape(title)}">{body}')
