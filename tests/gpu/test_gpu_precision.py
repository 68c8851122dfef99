"""Low precision follows fp32: losses of the same steps on the same batch.

The bounds are shares of what the loss falls by in fp32, set beforehand from the formats: bf16 has 8 significant bits,
FP8 (e4m3) 4, and errors average out over a matrix product.
"""

from typing import get_args

import pytest
import torch
from gpu_runs import SHRUNKEN, WIDE_7B, WIDE_70B, Device, Figures, Size, largest_gap, run_config, sft_losses

from srlm_mega.config.training import Fp8Recipe
from srlm_mega.errors import UserError
from srlm_mega.training import backend

BF16_GAP, FP8_GAP = 0.02, 0.10
ENGINE = pytest.mark.skipif(not backend.installed("transformer_engine"), reason="Transformer Engine is not installed")
ON_GPU = [pytest.param(size, "cuda", marks=pytest.mark.gpu, id=size.name) for size in (WIDE_70B, WIDE_7B)]
SIZES = [*ON_GPU, pytest.param(SHRUNKEN, "cpu", id="shrunken")]
TRUTH: dict[str, list[float]] = {}


def truth(size: Size, device: Device) -> list[float]:
    """Losses in fp32 with plain PyTorch layers, computed once; they must fall for anything to be compared."""
    if size.name not in TRUTH:
        TRUTH[size.name] = sft_losses(run_config(size, device, layer_backend="torch"))
    losses = TRUTH[size.name]
    assert min(losses) < 0.8 * losses[0], f"the loss fell from {losses[0]} to {min(losses)} only"
    return losses


def check(size: Size, device: Device, name: str, bound: float, figures: Figures, **trainer: object) -> None:
    want, got = truth(size, device), sft_losses(run_config(size, device, bf16=True, **trainer))
    gap = largest_gap(got, want)
    figures[f"{size.name}, {name}"] = {"largest_gap": gap, "bound": bound, "losses": got, "fp32_losses": want}
    assert gap < bound


@pytest.mark.parametrize(("size", "device"), SIZES)
def test_bf16_follows_fp32(size: Size, device: Device, figures: Figures) -> None:
    check(size, device, "bf16, torch", BF16_GAP, figures, layer_backend="torch")


@ENGINE
@pytest.mark.parametrize(("size", "device"), ON_GPU)
def test_transformer_engine_follows_fp32(size: Size, device: Device, figures: Figures) -> None:
    check(size, device, "bf16, Transformer Engine", BF16_GAP, figures, layer_backend="transformer_engine")


@ENGINE
@pytest.mark.parametrize(("size", "device"), ON_GPU)
@pytest.mark.parametrize("recipe", get_args(Fp8Recipe))
def test_fp8_follows_fp32(recipe: Fp8Recipe, size: Size, device: Device, figures: Figures) -> None:
    try:
        backend.check_capability(torch.cuda.get_device_capability(), recipe)
    except UserError as error:
        pytest.skip(str(error))
    check(size, device, f"FP8, {recipe}", FP8_GAP, figures, fp8="hybrid", fp8_recipe=recipe)


@pytest.mark.parametrize(("size", "device"), SIZES)
def test_another_learning_rate_would_be_seen(size: Size, device: Device) -> None:
    """Negative control: fp32 with a rate 1.3 times as large leaves the larger bound."""
    faster = run_config(size, device, layer_backend="torch")
    section = faster.sft.model_copy(update={"lr": 1.3 * size.lr, "min_lr": 1.3 * size.lr})
    assert largest_gap(sft_losses(faster.model_copy(update={"sft": section})), truth(size, device)) > FP8_GAP
