"""Peak memory: the table that ranks fill together, by hand."""

import psutil
import pytest
import torch
from torch import Tensor

from srlm_mega.config.training import ParallelConfig
from srlm_mega.training import device
from srlm_mega.training.device import GIB, device_name, own_peak_bytes, peak_memory
from srlm_mega.training.topology import Topology

CPU = torch.device("cpu")


def test_a_stage_has_the_memory_of_its_largest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks, two stages: 2 and 3 GiB (this one, rank 1) on the first, 5 and 4 on the second. Not the last rank's
    alone, and not the sum."""
    others = torch.tensor([[2.0, 0, 0, 0], [0, 0, 5, 4]], dtype=torch.float64)

    def sum_over_world(self: Topology, own: Tensor) -> Tensor:
        assert own.count_nonzero() == 1
        return own + others

    monkeypatch.setattr(Topology, "sum_over_world", sum_over_world)
    monkeypatch.setattr(device, "own_peak_bytes", lambda device: 3 * GIB)
    topology = Topology(1, 4, CPU, 1, 2, 0, 2, 0, 1, ParallelConfig())
    assert peak_memory(topology) == {"memory/stage_0_peak_rss_GiB": 3.0, "memory/stage_1_peak_rss_GiB": 5.0}


def test_the_peak_is_in_bytes() -> None:
    """It cannot be below what is resident now, nor a thousand times that."""
    resident = psutil.Process().memory_info().rss
    assert resident * 0.99 < own_peak_bytes(CPU) < 100 * resident
    assert device_name(CPU) is None
