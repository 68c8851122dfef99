"""`srlm compare`: several runs in one table."""

import shutil
from pathlib import Path

import pytest
from fake_run import make_run
from typer.testing import CliRunner

from srlm_mega.cli.main import app
from srlm_mega.errors import CannotContinue
from srlm_mega.evaluation.intervals import Interval
from srlm_mega.report.headlines import ACCURACY, QUALITY
from srlm_mega.tools.compare_runs import bracketed, comparison, mean_gain, share


def test_mean_gain_is_over_the_runs_that_measured_both_ends() -> None:
    """0.80 -> 0.84 and 0.90 -> 0.88: +4 and -2 points, mean +1; the third run has no change."""
    changes = [Interval(0.04), Interval(-0.02), None]
    assert mean_gain(changes, ACCURACY) == "+1.0 points (runs -2.0 to +4.0)"
    assert mean_gain(changes[:1], QUALITY) == "+0.04"
    assert mean_gain([None], ACCURACY) == "-"


def test_every_figure_stands_with_its_interval_and_prompts(tmp_path: Path) -> None:
    text = comparison([make_run(tmp_path / name, rounds=1) for name in ("a", "b")])
    row = "| M2 | 4.28 [4.19, 4.37] | 4.43 [4.33, 4.53] | .660 / .240 / .100 | .780 [.689, .850] | .830 [.828, .832] |"
    assert all(f"| {run} {row} .870 | .180 | 1.000 | 100 / 100 | 19 |" in text for run in ("a", "b"))
    assert "95 % intervals over prompts" in text and "Chance is .500" in text
    assert "a: Sampled quality by ground truth rises from 3.27 to 4.28" in text
    assert "mean of 2 run(s): sampled quality +1.01 (runs +1.01 to +1.01), judge accuracy +1.5 points (runs" in text


def test_runs_of_the_same_name_are_two_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "toy", rounds=1) for name in ("a", "b")]
    text = comparison(runs)
    assert all(f"| {run} | M2 | 4.28" in text for run in runs) and "mean of 2 run(s)" in text


def test_no_result_is_no_success(tmp_path: Path) -> None:
    """Of runs that have evaluated nothing."""
    run = make_run(tmp_path / "toy", rounds=1)
    for evaluated in run.glob("M*/evaluation"):
        shutil.rmtree(evaluated)
    for argv in (["compare", str(run), str(run)], ["evaluate", "lengths", str(run)]):
        error = CliRunner().invoke(app, argv).exception
        assert isinstance(error, CannotContinue) and f"no model of {run}" in str(error), argv


def test_shares_have_no_leading_zero() -> None:
    assert bracketed(None, QUALITY) == "-" and bracketed(Interval(10.5), QUALITY) == "10.50 [unknown]"


@pytest.mark.parametrize(("value", "shown"), [(None, "-"), (0.8513, ".851"), (1.0, "1.000"), (0.0, ".000")])
def test_shares(value: float | None, shown: str) -> None:
    assert share(value) == shown
