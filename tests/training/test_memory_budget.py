"""The memory of weights, gradients and optimizer, worked out by hand."""

import pytest

from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.checkpoints_conversion.placement import placements
from srlm_mega.config.model_sizes import GIB
from srlm_mega.errors import UserError
from srlm_mega.training.memory_budget import MemoryBudget, num_parameters

LLAMA_70B = LlamaShape(80, 8192, 28672, 64, 8, 32000, 4096, 1e-5, 10000.0)


def test_parameters_of_llama_2_70b() -> None:
    """A layer: query and output 2 * 8192 * 8192, key and value 2 * 8192 * 1024, MLP 3 * 8192 * 28672: 855,638,016,
    and two norms of 8192. TP 8, PP 4: 20 layers of 855,638,016 / 8 + 16,384; the vocabulary is 32000 * 8192 / 8."""
    stages = placements(LLAMA_70B, 8, 4)[::8]
    first, second, _, last = (num_parameters(LLAMA_70B, stage) for stage in stages)
    assert second == 20 * (855_638_016 // 8 + 16_384) == 2_139_422_720
    assert first == second + 32_768_000
    assert last == second + 32_768_000 + 8192
    (whole,) = placements(LLAMA_70B, 1, 1)
    assert num_parameters(LLAMA_70B, whole) == 68_976_648_192  # what the published model has


def test_tied_embeddings_are_held_once_unless_stages_part_them() -> None:
    tied = LlamaShape(2, 8, 16, 2, 1, 32, 64, 1e-5, 10000.0, tie_word_embeddings=True)
    untied = LlamaShape(2, 8, 16, 2, 1, 32, 64, 1e-5, 10000.0)
    (whole,) = placements(tied, 1, 1)
    assert num_parameters(untied, whole) - num_parameters(tied, whole) == 32 * 8
    assert [num_parameters(tied, stage) for stage in placements(tied, 1, 2)] == [
        num_parameters(untied, stage) for stage in placements(untied, 1, 2)
    ]


@pytest.mark.parametrize(
    ("bf16", "shards", "optimizer"),
    [(True, 1, 12.0), (True, 4, 3.0), (False, 1, 8.0), (False, 2, 4.0)],
)
def test_bytes_per_parameter(bf16: bool, shards: int, optimizer: float) -> None:
    """2^30 parameters, so that bytes per parameter are GiB."""
    budget = MemoryBudget(GIB, bf16, shards)
    assert (budget.weights / GIB, budget.gradients / GIB) == (2 if bf16 else 4, 4)
    assert budget.optimizer / GIB == optimizer
    assert budget.total / GIB == (2 if bf16 else 4) + 4 + optimizer


def test_what_cannot_be_held_is_refused_with_the_arithmetic() -> None:
    budget = MemoryBudget(GIB, True, 2)
    budget.check(12 * GIB, "cuda:0")
    with pytest.raises(UserError) as refused:
        budget.check(12 * GIB - 1, "cuda:0")
    message = str(refused.value)
    assert "weights * 2 bytes 2.00 GiB + gradients * 4 bytes 4.00 GiB" in message
    assert "optimizer * 12 bytes / 2 processes 6.00 GiB = 12.00 GiB, more than the 12.00 GiB that cuda:0 has" in message
