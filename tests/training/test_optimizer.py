"""The learning rate of every step, by hand; what an update takes to the host."""

from typing import Any

import pytest
import torch
from operators import READ, Operators
from recorded_rates import RecordedRates
from tiny_llama import SHAPE, training_config

from srlm_mega.config.training import OptimizationConfig
from srlm_mega.training import adamw
from srlm_mega.training.model import build_model, transformer_config, wrap_data_parallel
from srlm_mega.training.optimizer import build_optimizer, build_scheduler, update
from srlm_mega.training.topology import Topology


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


@pytest.mark.parametrize(("bf16", "sharded"), [(False, False), (True, True)])
def test_an_update_takes_one_number_to_the_host(bf16: bool, sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm; with the update as on a GPU. Gradients are scaled to a norm of 1, the default of `clip_grad`."""
    monkeypatch.setattr(adamw, "fusible", lambda params: True)
    settings = training_config(1, bf16, use_distributed_optimizer=sharded)
    with Topology.start(settings.parallel, settings.trainer, seed=0) as topology:
        llama = transformer_config(SHAPE, settings.sft, settings, topology)
        (chunk,) = wrap_data_parallel(build_model(llama, SHAPE, topology), llama, topology)
        for param in chunk.parameters():
            torch.nn.init.ones_(param)
        optimizer = build_optimizer([chunk], settings.sft, settings.trainer, topology)
        gradients = [param.main_grad for param in chunk.parameters()]
        torch._foreach_add_(gradients, 0.5)
        with Operators() as called:
            norm = update(optimizer)
        assert called.names.count(READ) == 1
        assert norm == pytest.approx(0.5 * sum(gradient.numel() for gradient in gradients) ** 0.5)
        two_roundings = 2 * torch.finfo(torch.float32).eps  # of the factor, and of the product
        for gradient in gradients:
            torch.testing.assert_close(gradient, torch.full_like(gradient, 0.5 / norm), rtol=two_roundings, atol=0)
