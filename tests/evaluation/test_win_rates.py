"""Wins, ties and losses by prompt."""

import pytest

from srlm_mega.evaluation.win_rates import head_to_head, wilson_interval


def test_samples_are_compared_prompt_by_prompt() -> None:
    ours = {"a": [5.0, 2.0], "b": [3.0, 3.0]}
    theirs = {"b": [3.0, 4.0], "a": [4.0, 2.0]}
    result = head_to_head(ours, theirs)
    assert (result.wins, result.ties, result.losses) == (1, 2, 1)
    assert (result.prompts, result.comparisons) == (2, 4)
    assert (result.win_rate, result.tie_rate, result.loss_rate, result.score) == (0.25, 0.5, 0.25, 0.5)


def test_the_other_side_sees_the_mirror_image() -> None:
    ours, theirs = {"a": [5.0], "b": [4.0], "c": [1.0]}, {"a": [1.0], "b": [4.0], "c": [0.0]}
    forward, backward = head_to_head(ours, theirs), head_to_head(theirs, ours)
    assert (forward.wins, forward.losses) == (backward.losses, backward.wins) == (2, 0)
    assert forward.score_low == pytest.approx(1 - backward.score_high)


def test_wilsons_interval_by_hand() -> None:
    # p = 1/2, n = 100, z = 1.96: centre 1/2, half width 1.96 * sqrt(0.0025 + 0.000096) / 1.0384 = 0.0962.
    low, high = wilson_interval(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_more_prompts_narrow_the_interval_more_samples_do_not() -> None:
    few = head_to_head({"a": [1.0], "b": [0.0]}, {"a": [0.0], "b": [1.0]})
    more_samples = head_to_head({"a": [1.0, 1.0], "b": [0.0, 0.0]}, {"a": [0.0, 0.0], "b": [1.0, 1.0]})
    more_prompts = head_to_head({name: [1.0] for name in "abcd"}, {name: [1.0] for name in "abcd"})
    assert (few.score_low, few.score_high) == (more_samples.score_low, more_samples.score_high)
    assert more_prompts.score_high - more_prompts.score_low < few.score_high - few.score_low


def test_different_prompts_or_samples_are_refused() -> None:
    for ours, theirs in (({"a": [1.0]}, {"b": [1.0]}), ({}, {}), ({"a": [1.0]}, {"a": [1.0, 2.0]})):
        with pytest.raises(ValueError):
            head_to_head(ours, theirs)
