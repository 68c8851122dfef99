"""Runs that are killed, stopped and paused at random, several times each, resumed to the undisturbed bytes."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import STAGES, TURN, WINDOWS, Trial, arguments, without

pytestmark = pytest.mark.extra
TURNS = {"test_a_run_that_is_killed_goes_on_to_the_same_bytes": range(6)}


def test_a_run_that_is_killed_goes_on_to_the_same_bytes(
    undisturbed: Path, prompts: Path, tmp_path: Path, judged: Callable[..., None], rng: random.Random, number: int
) -> None:
    """A trial makes a part of the stages anew, drawn at random; beyond the first twenty some make all of them."""
    window = STAGES if number and number % TURN == 0 else rng.choice(WINDOWS)
    trial = Trial(tmp_path / "trial", arguments(prompts))
    without(undisturbed, window, trial.folder)
    trial.interrupt_often(rng, window)
    trial.finish()
    judged("killed, stopped, paused", trial, undisturbed)
