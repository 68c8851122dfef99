"""EFT replay: how many steps, where they are, and that DPO's own stay what they are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlm_mega.training.replay import Turns, num_replayed
from srlm_mega.training.split import batch_order


def test_steps_to_add_by_hand() -> None:
    assert num_replayed(95, 0.05) == 5 and num_replayed(90, 0.1) == 10 and num_replayed(10, 0.0) == 0
    assert num_replayed(3, 0.05) == 0, "too few steps for one"


def test_order_by_hand() -> None:
    """Two among four: the third and the sixth of six."""
    turns = list(Turns("dpo", 8, 4, "sft", 4, 2)(batch_size=4, seed=3))
    assert [turn.objective for turn in turns] == ["dpo", "dpo", "sft", "dpo", "dpo", "sft"]
    assert [turn.epoch for turn in turns] == [0.5, 1.0, 1.0, 1.5, 2.0, 2.0]
    assert [turn.replayed for turn in turns] == [False, False, True, False, False, True]


@given(st.integers(1, 60), st.integers(0, 30), st.integers(0, 5))
def test_dpo_keeps_its_batches(steps: int, replayed: int, seed: int) -> None:
    order = batch_order(7, 3, seed)
    turns = Turns("dpo", 7, steps, "sft", 5, replayed)
    made = list(turns(3, seed))
    assert len(made) == turns.total == steps + replayed
    assert [turn.indices for turn in made if not turn.replayed] == [next(order) for _ in range(steps)]
    assert made[0].replayed is False, "the first loss must be ln 2"
    gaps = [sum(turn.replayed for turn in made[: number + 1]) for number in range(len(made))]
    assert all(abs(count - (number + 1) * replayed / len(made)) <= 1 for number, count in enumerate(gaps)), "spread"


def test_without_replay_there_is_one_objective() -> None:
    assert [turn.objective for turn in Turns("dpo", 7, 3)(3, 0)] == ["dpo"] * 3


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_the_share_is_of_all_steps(share: float) -> None:
    assert num_replayed(1000, share) / (1000 + num_replayed(1000, share)) == pytest.approx(share, abs=1e-3)
