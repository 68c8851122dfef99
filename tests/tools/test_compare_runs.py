"""`srlm compare`: several runs in one table."""

import pytest

from srlm_mega.tools.compare_runs import mean_gain, share


def test_mean_gain_is_over_the_runs_that_measured_both_ends() -> None:
    # (0.80 -> 0.84) and (0.90 -> 0.88): +0.04 and -0.02, mean +0.01; the third run has no first value
    assert mean_gain([(0.80, 0.84), (0.90, 0.88), (None, 0.5)]) == "+0.010"
    assert mean_gain([(None, 1.0)]) == "-"


@pytest.mark.parametrize(("value", "shown"), [(None, "-"), (0.8513, ".851"), (1.0, "1.000"), (0.0, ".000")])
def test_shares(value: float | None, shown: str) -> None:
    assert share(value) == shown
