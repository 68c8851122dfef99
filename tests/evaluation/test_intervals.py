"""Intervals over prompts: exact cases, a slow twin, and how often they contain the truth."""

import random

import numpy as np
import pytest
from scipy.stats import binom

from srlm_mega.evaluation import intervals
from srlm_mega.evaluation.intervals import (
    Interval,
    PromptShares,
    accuracy_shares,
    bootstrap,
    estimate,
    paired_change,
    quality_shares,
)
from srlm_mega.evaluation.judge_metrics import RankedScore, judge_metrics, judged_prompt
from srlm_mega.evaluation.results import EvaluationSample, JudgedPrompt
from srlm_mega.evaluation.win_rates import FEWEST_PROMPTS


def shares(*parts: float, whole: float = 1.0) -> PromptShares:
    return {f"p{number}": (part, whole) for number, part in enumerate(parts)}


def test_equal_prompts_have_a_point_as_interval() -> None:
    assert estimate(shares(*[3.0] * 20)) == Interval(3.0, 3.0, 3.0, 20)
    assert paired_change(shares(*[3.0] * 20), shares(*[3.0] * 20)) == Interval(0.0, 0.0, 0.0, 20)
    assert paired_change(shares(*[3.0] * 20), shares(*[4.0] * 20)) == Interval(1.0, 1.0, 1.0, 20)


def test_nothing_to_average_has_no_figure() -> None:
    assert estimate({}) is None and estimate(shares(0.0, 0.0, whole=0.0)) is None
    assert paired_change({}, {}) is None and paired_change(shares(1.0), {}) is None
    assert paired_change(shares(1.0, 1.0), shares(0.0, 0.0, whole=0.0)) is None, "one judge gave no score at all"


@pytest.mark.parametrize("prompts", range(1, FEWEST_PROMPTS))
def test_one_prompt_and_a_few_have_no_interval(prompts: int) -> None:
    better = paired_change(shares(*[1.0] * prompts), shares(*[5.0] * prompts))
    assert better == Interval(4.0, None, None, prompts) and not better.excludes(0)
    assert estimate(shares(*[1.0] * prompts)) == Interval(1.0, None, None, prompts)


@pytest.mark.parametrize(("better", "is_shown"), [(1, False), (5, False), (6, True), (34, True)])
def test_a_few_prompts_that_differ_show_nothing_however_many_are_equal(better: int, is_shown: bool) -> None:
    """The case of one pair of 34; five that are all better are chance once in 16 times."""
    after = paired_change(shares(*[0.0] * 34), shares(*[1.0] * better, *[0.0] * (34 - better)))
    assert after is not None and after.value == pytest.approx(better / 34)
    assert after.excludes(0) is is_shown


def test_an_accuracy_is_a_ratio_of_sums() -> None:
    """One prompt of 30 pairs, all right, and nine of one pair, all wrong: 30 of 39, not the mean of ten shares."""
    found = estimate({"long": (30.0, 30.0)} | {f"p{number}": (0.0, 1.0) for number in range(9)})
    assert found is not None and found.value == 30 / 39 and found.n == 10
    assert found.low == 0 and found.high is not None and found.high > 0.8


def test_a_prompt_without_pairs_is_not_counted() -> None:
    found = estimate(shares(*[1.0, 0.0] * 4, whole=1.0) | {"unparsed": (0.0, 0.0)})
    assert found is not None and (found.value, found.n) == (0.5, 8)


def test_only_prompts_of_both_models_are_compared_each_with_itself() -> None:
    before = {f"p{number}": (float(number % 5), 1.0) for number in range(32)}
    after = {name: (part + 0.5, whole) for name, (part, whole) in reversed(before.items())} | {"new": (0.0, 1.0)}
    assert paired_change(before, after) == Interval(0.5, 0.5, 0.5, 32), "what differs between prompts cancels"
    assert estimate(before) != estimate({name: (5 - part, whole) for name, (part, whole) in before.items()})


def test_seeds_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same data gives the same interval, in one block or in many; another seed gives nearly the same one."""
    table = np.random.default_rng(1).integers(0, 6, size=(50, 2, 2)) + 1.0
    whole, other = bootstrap(table), bootstrap(table, seed=1)
    monkeypatch.setattr(intervals, "BLOCK", 120)
    assert np.array_equal(bootstrap(table), whole) and not np.array_equal(other, whole)
    assert np.quantile(other, 0.025) == pytest.approx(np.quantile(whole, 0.025), abs=0.2 * whole.std())


def test_the_slow_twin_draws_one_prompt_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "RESAMPLES", 300)
    draw, number = np.random.default_rng(0), random.Random(3)
    before, after = (
        {f"p{one}": (float(number.randint(0, 4)), float(number.randint(4, 6))) for one in range(9)} for _ in range(2)
    )
    changes = []
    for _ in range(300):
        names = [f"p{draw.integers(9)}" for _ in range(9)]
        first, last = (
            sum(model[name][0] for name in names) / sum(model[name][1] for name in names) for model in (before, after)
        )
        changes.append(last - first)
    found = paired_change(before, after)
    assert found is not None and found.low is not None and found.high is not None
    # For 9 prompts, t(8) = 2.3060, times sqrt(9 / 8) = 2.4459: a tail of 0.72 % instead of 2.5 %.
    assert (found.low, found.high) == pytest.approx(quantiles(changes, 0.0072), abs=1e-3)
    assert (found.low, found.high) != pytest.approx(quantiles(changes, 0.025), abs=1e-3)


def quantiles(values: list[float], tail: float) -> tuple[float, float]:
    """Between the two nearest of the sorted values, in proportion."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        return ordered[low] + (place - low) * (ordered[low + 1] - ordered[low])

    return at(tail), at(1 - tail)


def simulated(number: random.Random, prompts: int) -> tuple[PromptShares, PromptShares]:
    """Two judges of 3 to 6 pairs a prompt, which are easy or hard for both; right in 65 % and in 70 % on average."""
    before, after = {}, {}
    for name in range(prompts):
        pairs, ease = number.randint(3, 6), number.choice((-0.25, 0.25))
        for model, skill in ((before, 0.65), (after, 0.7)):
            model[f"p{name}"] = (float(sum(number.random() < skill + ease for _ in range(pairs))), float(pairs))
    return before, after


@pytest.mark.parametrize("prompts", [12, 30])
def test_an_interval_contains_the_truth_in_95_of_100_cases(prompts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds: what a binomial of 500 times 0.95 leaves once in a thousand times. Half as wide an interval, as if pairs
    of one prompt were independent, is outside of them."""
    monkeypatch.setattr(intervals, "RESAMPLES", 500)
    number, times = random.Random(5), 500
    inside = {"estimate": 0, "change": 0, "half": 0}
    for _ in range(times):
        before, after = simulated(number, prompts)
        one, change = estimate(before), paired_change(before, after)
        assert one is not None and change is not None and change.low is not None and change.high is not None
        inside["estimate"] += not one.excludes(0.65)
        inside["change"] += not change.excludes(0.05)
        inside["half"] += abs(change.value - 0.05) <= (change.high - change.low) / 4
    least, most = binom.ppf((0.0005, 0.9995), times, 0.95)
    assert least <= inside["estimate"] <= most and least <= inside["change"] <= most, inside
    assert inside["half"] < least, inside


def test_equal_models_are_told_apart_in_5_of_100_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is taken for a difference no more often than that, also where most prompts do not differ."""
    monkeypatch.setattr(intervals, "RESAMPLES", 500)
    number, times, claims = random.Random(6), 500, 0
    for _ in range(times):
        flips = [number.choice((-1.0, 0.0, 0.0, 0.0, 1.0)) for _ in range(34)]
        change = paired_change(shares(*[1.0] * 34), shares(*[1 + flip for flip in flips]))
        claims += change is not None and change.excludes(0)
    assert claims <= binom.ppf(0.9995, times, 0.05), claims


def test_qualities_of_prompts() -> None:
    samples = [EvaluationSample("a", "p", "g", "s", 5, 2), EvaluationSample("b", "p", "g", "s", None, None)]
    assert quality_shares(samples) == {"a": (2.0, 1.0)} and quality_shares(samples, greedy=True) == {"a": (5.0, 1.0)}


def test_pairs_of_prompts_add_up_to_the_judges_metrics() -> None:
    replicates: dict[str, list[list[RankedScore]]] = {
        "a": [[(0, 5), (1, 3), (2, 3)], [(0, 4), (1, 4), (2, 5)]],
        "b": [[(0, 5), (1, None)], [(0, 1), (1, 2)]],
        "c": [[(0, None)]],
    }
    records = [judged_prompt(name, 3, scored) for name, scored in replicates.items()]
    assert records[0] == JudgedPrompt("a", judgements=3, pairs=6, right=2, tied=2)
    assert records[2] == JudgedPrompt("c", judgements=3, pairs=0, right=0, tied=0)
    found = estimate(accuracy_shares([*records, judged_prompt("a", 1, replicates["b"])], judgements=3))
    metrics = judge_metrics(scored for one in replicates.values() for scored in one)
    assert found is not None and found.value == metrics.pair_acc_half and found.n == 2
