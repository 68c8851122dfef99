"""The main results of a run in words. A figure is said to rise or fall only where the paired interval of its change
excludes zero: anything else may be noise."""

from collections.abc import Mapping
from dataclasses import dataclass

from srlm_mega.evaluation.intervals import Interval
from srlm_mega.report.summary import Summary, percent


@dataclass(frozen=True, slots=True)
class Scale:
    """How a figure is written: multiplied, with so many decimals, and the units of it and of its change."""

    factor: float
    digits: int
    unit: str
    change_unit: str = ""

    def number(self, value: float, sign: str = "") -> str:
        """Return '3.27'; with the sign '+' every number has one."""
        return f"{self.factor * value:{sign}.{self.digits}f}"

    def bounds(self, interval: Interval, between: str = "–", sign: str = "") -> str:
        """Return '3.14–3.40', or 'unknown'."""
        if interval.low is None or interval.high is None:
            return "unknown"
        return f"{self.number(interval.low, sign)}{between}{self.number(interval.high, sign)}"


QUALITY, ACCURACY = Scale(1, 2, " of 5"), Scale(100, 1, "%", " points")


def findings(summary: Summary) -> list[str]:
    """Return the main results in sentences; empty before the first evaluation."""
    if not summary.models:
        return []
    last, newest = list(summary.models.items())[-1]
    found = newest.intervals
    qualities = {name: row.intervals.quality_sampled for name, row in summary.models.items()}
    accuracies = {name: row.intervals.judge_accuracy for name, row in summary.models.items()}
    sentences = []
    if found.quality_sampled is not None:
        change, evidence = compared(qualities, found.quality_change, QUALITY)
        sentences.append(f"Sampled quality by ground truth {change} ({evidence}).")
    if (score := found.score_vs_m1) is not None:
        sentences.append(
            f"Against M1 on the same {score.n} prompts, {last} wins {percent(newest.win_vs_m1)}, "
            f"ties {percent(newest.tie_vs_m1)} and loses {percent(newest.loss_vs_m1)}. With ties as halves its score "
            f"is {ACCURACY.number(score.value)}%, {side(score, summary.chance)} one half "
            f"(95% interval {ACCURACY.bounds(score, ' to ')}%)."
        )
    if (accuracy := found.judge_accuracy) is not None:
        change, evidence = compared(accuracies, found.judge_accuracy_change, ACCURACY)
        sentences.append(
            f"Judge accuracy (ties count half) {change} ({evidence}). The accuracy of {last} is "
            f"{side(accuracy, summary.chance)} chance, {percent(summary.chance)}; {last} ties "
            f"{percent(newest.judge.tie_rate)} of the pairs it judges."
        )
    return sentences


def compared(figures: Mapping[str, Interval | None], change: Interval | None, scale: Scale) -> tuple[str, str]:
    """Return the movement from the first model that has the figure to the last one, and the interval behind it."""
    known = [(name, figure) for name, figure in figures.items() if figure is not None]
    (first, before), (last, after) = known[0], known[-1]
    if change is None:
        span, shown, sign, unit = last, after, "", ""
    else:
        span, shown, sign, unit = (
            f"{first} to {last}: {scale.number(change.value, '+')}",
            change,
            "+",
            scale.change_unit,
        )
    prompts = "" if shown.n is None else f", {shown.n} prompts"
    evidence = f"{span}{unit}, 95% interval {scale.bounds(shown, ' to ', sign)}{prompts}"
    return movement(before, after, change, scale), evidence


def movement(before: Interval, after: Interval, change: Interval | None, scale: Scale) -> str:
    """Return 'rises from 3.27 to 4.68 of 5', 'is 3.27 and 3.31 of 5: no difference that 300 prompts can show', or
    'is 4.68 of 5' of one model alone, and where a change is too small to be seen in the rounded numbers."""
    first, last = scale.number(before.value), scale.number(after.value)
    if change is None or (change.excludes(0) and first == last):
        return f"is {last}{scale.unit}"
    if change.excludes(0):
        return f"{'rises' if change.value > 0 else 'falls'} from {first} to {last}{scale.unit}"
    nothing = (
        "whether they differ is unknown" if change.n is None else f"no difference that {change.n} prompts can show"
    )
    return f"is {first} and {last}{scale.unit}: {nothing}"


def side(interval: Interval, value: float) -> str:
    """Return where an interval is: 'above' a value, 'below' it, or 'not distinguishable from' it."""
    if not interval.excludes(value):
        return "not distinguishable from"
    return "above" if interval.value > value else "below"


def table_note(summary: Summary) -> str:
    """Return what the intervals of the table are over, and what chance is; empty before the first evaluation."""
    if not summary.models:
        return ""
    newest = list(summary.models.values())[-1].intervals
    over = {"quality and score": newest.quality_sampled, "judge": newest.judge_accuracy}
    prompts = [f"{figure.n or 'an unknown number of'} ({name})" for name, figure in over.items() if figure is not None]
    return (
        f"Below a figure: its 95% interval over prompts, {' and '.join(prompts)}. Chance is {percent(summary.chance)} "
        "for judge accuracy and for the score against M1, which both count a tie as one half."
    )
