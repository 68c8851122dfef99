"""The learning rate of every step, by hand."""

from typing import Any

import pytest
import torch
from recorded_rates import RecordedRates

from srlm_mega.config.training import OptimizationConfig
from srlm_mega.training.optimizer import build_scheduler, update


def rates(steps: int, **settings: Any) -> list[float]:
    """The rate each step is taken with, lr 10 and min_lr 2."""
    optimizer = RecordedRates()
    section = OptimizationConfig(train_iters=steps, lr=10, min_lr=2, **settings)
    scheduler = build_scheduler(optimizer, section, steps)
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        scheduler.step(1)
    return used


@pytest.mark.parametrize(
    ("style", "by_hand"),
    [
        ("linear", [10, 8, 6, 4, 2]),
        ("cosine", [10, 6 + 4 * 0.5**0.5, 6, 6 - 4 * 0.5**0.5, 2]),
        ("constant", [10, 10, 10, 10, 10]),
    ],
)
def test_decay(style: str, by_hand: list[float]) -> None:
    assert rates(5, lr_decay_style=style) == pytest.approx(by_hand)


def test_warmup_rises_to_lr_and_never_takes_a_step_of_zero() -> None:
    """Two of eight steps: lr / 3, lr * 2 / 3, then lr at the third, and down to min_lr at the eighth."""
    used = rates(8, lr_warmup_fraction=0.25, lr_decay_style="linear")
    assert used == pytest.approx([10 / 3, 20 / 3, 10, 8.4, 6.8, 5.2, 3.6, 2])


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9])
def test_short_trainings(fraction: float) -> None:
    assert rates(1, lr_warmup_fraction=fraction) == [10]
    assert rates(2, lr_warmup_fraction=fraction) == pytest.approx([10, 2])
    assert rates(3, lr_warmup_fraction=fraction)[-1] == pytest.approx(2)


def test_norms_are_not_decayed() -> None:
    optimizer = RecordedRates()
    build_scheduler(optimizer, OptimizationConfig(train_iters=2, lr=1, min_lr=0, weight_decay=0.1), 2)
    assert optimizer.param_groups[0]["weight_decay"] == 0.0


class FusedNorm:
    """What megatron-core 0.19 gives with Transformer Engine: a norm that is still a tensor."""

    chained_optimizers = ()

    def prepare_grads(self) -> bool:
        return False

    def get_grad_norm(self) -> torch.Tensor:
        return torch.tensor([2.0])

    def step_with_ready_grads(self) -> bool:
        return True


def test_the_norm_of_an_update_is_a_number() -> None:
    """It goes into metrics.jsonl."""
    norm = update(FusedNorm())
    assert type(norm) is float and norm == 2.0
