"""Which positions a context-parallel rank holds. tests/distributed runs the attention over several ranks."""

import pytest
import torch

from srlm_mega.training.context_parallel import cp_positions


def test_chunks_from_both_ends() -> None:
    """12 positions on 2 ranks: chunks 0 to 3 of 3 positions; rank 0 holds chunks 0 and 3, rank 1 chunks 1 and 2."""
    assert cp_positions(12, 0, 2).tolist() == [0, 1, 2, 9, 10, 11]
    assert cp_positions(12, 1, 2).tolist() == [3, 4, 5, 6, 7, 8]
    assert cp_positions(6, 0, 1).tolist() == [0, 1, 2, 3, 4, 5]


def test_every_position_has_one_rank() -> None:
    together = torch.cat([cp_positions(24, rank, 3) for rank in range(3)])
    assert together.sort().values.tolist() == list(range(24))


def test_a_length_that_does_not_divide() -> None:
    with pytest.raises(AssertionError, match="10 positions are not a multiple of 2"):
        cp_positions(10, 0, 2)
