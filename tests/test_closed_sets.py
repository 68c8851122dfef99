"""A value outside a closed set is an error that names it, never the last branch of a choice."""

from collections.abc import Callable

import pytest
import torch
from places import CONFIGS

from srlm_mega.config.file import load_config
from srlm_mega.config.training import DpoConfig, ParallelConfig, TrainerConfig
from srlm_mega.gpus import peak_tflops
from srlm_mega.kernels import reference
from srlm_mega.tools.planner.training_steps import scales_whole_tensors
from srlm_mega.training.backend import Backend, block, check_capability, choose_backend
from srlm_mega.training.dpo import loss_without_margin
from srlm_mega.training.fp8_recipe import length_multiple, precision_before_training
from srlm_mega.training.topology import choose_device

FP8 = TrainerConfig(bf16=True, fp8="hybrid").model_copy(update={"fp8_recipe": "kto"})
TOY = load_config(CONFIGS / "toy_cpu.yaml")
CONFIG = TOY.model_copy(update={"model": TOY.model.model_copy(update={"layer_backend": "kto"})})
DPO = DpoConfig(train_iters=1, lr=1e-3, min_lr=0).model_copy(update={"loss_type": "kto"})


def reference_loss() -> None:
    logp, ref, bounds = torch.zeros(2), torch.zeros(2), torch.tensor([0, 1, 2])
    settings = reference.DpoSettings(0.1)
    object.__setattr__(settings, "loss_type", "kto")  # behind its own check
    reference.dpo_loss(logp, bounds, torch.tensor([[0, 1]]), ref, settings)


@pytest.mark.parametrize(
    "choose",
    [
        reference_loss,
        lambda: loss_without_margin(DPO),
        lambda: block(Backend("torch", "kto", False, False), 1),  # type: ignore[arg-type]
        lambda: choose_backend(CONFIG, torch.device("cpu")),
        lambda: length_multiple(FP8, ParallelConfig()),
        lambda: precision_before_training([], FP8),
        lambda: check_capability((9, 0), FP8.fp8_recipe),
        lambda: scales_whole_tensors(FP8.fp8_recipe),
        lambda: peak_tflops("NVIDIA H200", "kto"),  # type: ignore[arg-type]
        lambda: choose_device("kto"),  # type: ignore[arg-type]
    ],
    ids=["loss", "first loss", "attention", "layers", "multiple", "reference", "capability", "casts", "peak", "device"],
)
def test_an_unknown_value_is_named(choose: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # where the devices end
    with pytest.raises(AssertionError, match="kto"):
        choose()
