"""Ranks and devices, as far as they go without starting processes (tests/distributed starts them)."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from places import CONFIGS

from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.config.file import load_config
from srlm_mega.config.training import ParallelConfig, TrainerConfig
from srlm_mega.training.model import check_memory, own_placements
from srlm_mega.training.topology import Topology, check_world_size, choose_device, process_group


def parallel(tp: int, pp: int, dp: int | None = None, vpp: int | None = None) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=dp,
        virtual_pipeline_model_parallel_size=vpp,
    )


def topology(tp_rank: int, tp: int, pp_rank: int, pp: int, vpp: int | None = None) -> Topology:
    return Topology(0, tp * pp, torch.device("cpu"), tp_rank, tp, pp_rank, pp, 0, 1, parallel(tp, pp, vpp=vpp))


def shape(num_layers: int) -> LlamaShape:
    return LlamaShape(num_layers, 32, 48, 4, 2, 64, 64, 1e-5, 10000.0, False)


@pytest.mark.parametrize(("tp", "pp", "dp", "world_size"), [(2, 2, None, 4), (2, 2, None, 8), (1, 2, 2, 4)])
def test_layouts_that_fill_the_world(tp: int, pp: int, dp: int | None, world_size: int) -> None:
    check_world_size(parallel(tp, pp, dp), world_size)


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "world_size", "arithmetic"),
    [
        (2, 2, None, 6, "TP 2 * PP 2 * DP 1 = 4, but 6 processes"),
        (2, 1, None, 1, "TP 2 * PP 1 * DP 1 = 2, but 1 processes"),
        (1, 2, 4, 4, "TP 1 * PP 2 * DP 4 = 8, but 4 processes"),
    ],
)
def test_layouts_that_do_not(tp: int, pp: int, dp: int | None, world_size: int, arithmetic: str) -> None:
    with pytest.raises(ValueError, match=arithmetic.replace("*", r"\*")):
        check_world_size(parallel(tp, pp, dp), world_size)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="no CUDA device"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("auto") == torch.device("cuda", 3)
    assert choose_device("cpu") == torch.device("cpu")


def test_nccl_connects_late_and_is_told_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device_id NCCL connects at once, and each of a layout's hundreds of new_group calls is then a split of all
    ranks; without one, a barrier guesses the device from the rank. Gloo's barrier takes no devices."""
    calls: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.update(device=device))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: calls.update(cudnn=on))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: calls.update(backend=backend, **given))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "barrier", lambda group=None, device_ids=None: calls.update(device_ids=device_ids))
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("RANK", raising=False)
    with process_group(TrainerConfig(device="cuda")) as device:
        replace(topology(0, 1, 0, 1), device=device).barrier()
    assert (calls["backend"], calls["device"], calls["device_ids"]) == ("nccl", torch.device("cuda", 3), [3])
    assert "device_id" not in calls
    assert calls["cudnn"] is False
    topology(0, 1, 0, 1).barrier()
    assert calls["device_ids"] is None


def test_chunks_of_a_rank() -> None:
    """Eight layers on two stages with two virtual ones: stage 1 holds the second and the fourth quarter."""
    first, last = own_placements(shape(8), topology(1, 2, 1, 2, vpp=2))
    assert (first.layers, last.layers) == ((2, 3), (6, 7))
    assert (first.tp_rank, first.first_stage, first.last_stage) == (1, False, False)
    assert (last.tp_rank, last.first_stage, last.last_stage) == (1, False, True)


def test_layers_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"5 = 2 \* 2 \+ 1"):
        own_placements(shape(5), topology(0, 1, 0, 2))


def test_a_model_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 layers on 2 stages: a layer is 32 * (12 heads * 8 + 3 * 48) + 64 = 7,744 parameters, the last stage holds 4
    and a vocabulary of 64 * 32 and the final norm of 32: 33,056, of 16 bytes each in fp32."""
    config = load_config(CONFIGS / "toy_cpu.yaml")
    monkeypatch.setattr(Topology, "memory_bytes", 33_056 * 16)
    check_memory(shape(8), config, topology(0, 1, 0, 2))
    monkeypatch.setattr(Topology, "memory_bytes", 33_056 * 16 - 1)
    with pytest.raises(ValueError, match="33,056 parameters per process"):
        check_memory(shape(8), config, topology(0, 1, 0, 2))


def test_a_process_has_its_share_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert topology(0, 1, 0, 1).memory_bytes == 100
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert topology(0, 1, 0, 1).memory_bytes == 12
