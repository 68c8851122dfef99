"""Memory and MFU of a DPO step. The figures are what matters; the checks say that they can be believed."""

import gc

import pytest
from gpu_runs import SHRUNKEN, WIDE_7B, WIDE_70B, Device, Figures, Size, dpo_step, fresh_device, run_config
from megatron.core.distributed import DistributedDataParallel

from srlm_mega.checkpoints_conversion.placement import placements
from srlm_mega.config.model_sizes import GIB
from srlm_mega.training import backend
from srlm_mega.training.memory_budget import MemoryBudget, num_parameters

ON_GPU = [pytest.param(size, "cuda", marks=pytest.mark.gpu, id=size.name) for size in (WIDE_70B, WIDE_7B)]


@pytest.mark.parametrize(("size", "device"), [*ON_GPU, pytest.param(SHRUNKEN, "cpu", id="shrunken")])
@pytest.mark.parametrize("fp8", [None, pytest.param("hybrid", marks=pytest.mark.gpu)])
def test_dpo_step(fp8: str | None, size: Size, device: Device, figures: Figures) -> None:
    """A device does not do more than its peak, and holds at least weights, gradients and optimizer."""
    if fp8 is not None and (device == "cpu" or not backend.installed("transformer_engine")):
        pytest.skip("FP8 needs CUDA and Transformer Engine")
    config = run_config(size, device, bf16=True, fp8=fp8)
    measured = dpo_step(config, steps=10, warmup=3) if device == "cuda" else dpo_step(config, steps=2, warmup=1)
    figures[f"DPO step, {size.name}, {fp8 or 'bf16'}"] = measured
    assert measured["useful_tokens/s/GPU"] > 0
    assert 0 < measured.get("MFU_causal", 0.5) < 1
    shape = config.model.shape
    (whole,) = placements(shape, 1, 1)
    held = MemoryBudget(num_parameters(shape, whole), bf16=True, optimizer_shards=1).total / GIB
    (peak,) = (value for key, value in measured.items() if key.startswith("memory/"))
    assert peak > held


def models_alive() -> list[DistributedDataParallel]:
    return [one for one in gc.get_objects() if isinstance(one, DistributedDataParallel)]


def test_no_model_outlives_its_test() -> None:
    """Megatron's hooks and the schedule's functions refer to the model, and it to them: only collecting frees it."""
    fresh_device()
    others = models_alive()  # of tests before it in this process, held so that none of them ends meanwhile
    dpo_step(run_config(SHRUNKEN, "cpu"), steps=1, warmup=1)
    assert len(models_alive()) > len(others), "as long as nothing is collected"
    fresh_device()
    assert len(models_alive()) == len(others)
