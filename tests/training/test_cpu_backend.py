"""The shims refuse what they do not know."""

from collections.abc import Callable

import pytest
import torch

from srlm_mega.training.cpu_backend import REBINDINGS, CpuRngStatesTracker, Rebinding, rebind


def test_rebinding_reaches_names_that_were_imported_before() -> None:
    def device() -> str:
        return "cuda"

    def is_half(name: str) -> bool:
        return name in ["torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor"]

    imported: Callable[[], str] = device
    rebind(Rebinding(device, {"cuda": "cpu"}))
    assert imported() == "cpu"
    assert is_half("torch.cuda.HalfTensor")
    rebind(Rebinding(is_half, {"torch.cuda.HalfTensor": "torch.HalfTensor"}))
    assert is_half("torch.HalfTensor") and not is_half("torch.cuda.HalfTensor")
    assert is_half("torch.cuda.BFloat16Tensor")


def test_a_literal_that_is_gone_is_an_error() -> None:
    def device() -> str:
        return "cpu"

    with pytest.raises(ValueError, match="no longer holds 'cuda'"):
        rebind(Rebinding(device, {"cuda": "cpu"}))


def test_every_function_is_listed_once() -> None:
    assert len({rebinding.function for rebinding in REBINDINGS}) == len(REBINDINGS)


def test_random_streams_are_independent_and_repeatable() -> None:
    def drawn() -> list[list[float]]:
        torch.manual_seed(1)
        tracker = CpuRngStatesTracker()
        tracker.add("model-parallel-rng", 7)
        numbers = [torch.rand(2).tolist()]
        for _ in range(2):
            with tracker.fork():
                numbers.append(torch.rand(2).tolist())
        return [*numbers, torch.rand(2).tolist()]

    torch.manual_seed(1)
    outside = [torch.rand(2).tolist(), torch.rand(2).tolist()]
    outer_first, inner_first, inner_second, outer_second = drawn()
    assert [outer_first, outer_second] == outside  # the stream leaves no trace outside
    assert inner_first != inner_second
    assert drawn() == [outer_first, inner_first, inner_second, outer_second]
