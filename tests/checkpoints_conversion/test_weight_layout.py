"""Layouts worked out by hand on tensors small enough to write down, and their inverses."""

import torch
from torch import Tensor

from srlm_mega.checkpoints_conversion.layout import (
    column_shard,
    fuse_qkv,
    gate_up_shard,
    merge_columns,
    merge_gate_up,
    merge_rows,
    merge_vocabulary,
    padded_vocab_size,
    row_shard,
    split_qkv,
    vocabulary_shard,
)


def rows(*values: float) -> Tensor:
    """A matrix with one input: [outputs, 1]."""
    return torch.tensor(values)[:, None]


def values(matrix: Tensor) -> list[float]:
    """Back from `rows`."""
    flat: list[float] = matrix[:, 0].tolist()
    return flat


def test_qkv_with_grouped_queries() -> None:
    """4 heads, 2 groups, d = 1: each group has its two queries, its key, its value."""
    q, k, v = rows(0, 1, 2, 3), rows(10, 11), rows(20, 21)
    fused = fuse_qkv(q, k, v, num_query_groups=2)
    assert values(fused) == [0, 1, 10, 20, 2, 3, 11, 21]
    assert [values(part) for part in split_qkv(fused, 4, 2)] == [[0, 1, 2, 3], [10, 11], [20, 21]]


def test_qkv_keeps_the_rows_of_a_head_together() -> None:
    """2 heads, 2 groups (MHA), d = 2."""
    fused = fuse_qkv(rows(0, 1, 2, 3), rows(10, 11, 12, 13), rows(20, 21, 22, 23), num_query_groups=2)
    assert values(fused) == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]


def test_a_rank_of_fused_qkv_is_the_fusion_of_its_heads() -> None:
    """Splitting after fusing equals fusing after splitting: ranks hold whole groups."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads * 3, 5, generator=generator) for heads in (8, 4, 4))
    whole = fuse_qkv(q, k, v, num_query_groups=4)
    for rank in range(2):
        own = fuse_qkv(*(column_shard(part, rank, 2) for part in (q, k, v)), num_query_groups=2)
        assert torch.equal(own, column_shard(whole, rank, 2))


def test_gate_and_up_are_split_each_for_itself() -> None:
    gate, up = rows(0, 1, 2, 3), rows(10, 11, 12, 13)
    shards = [gate_up_shard(gate, up, rank, 2) for rank in range(2)]
    assert [values(shard) for shard in shards] == [[0, 1, 10, 11], [2, 3, 12, 13]]
    assert [values(part) for part in merge_gate_up(shards)] == [[0, 1, 2, 3], [10, 11, 12, 13]]


def test_splitting_the_stacked_gate_and_up_is_another_layout() -> None:
    """Negative control: the mistake that `gate_up_shard` is there to avoid."""
    stacked = torch.cat([rows(0, 1, 2, 3), rows(10, 11, 12, 13)])
    wrong = [column_shard(stacked, rank, 2) for rank in range(2)]
    assert [values(part) for part in merge_gate_up(wrong)] == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_columns_split_outputs_and_rows_split_inputs() -> None:
    weight = torch.tensor([[0.0, 1, 2, 3], [10, 11, 12, 13]])
    assert column_shard(weight, 1, 2).tolist() == [[10, 11, 12, 13]]
    assert row_shard(weight, 1, 2).tolist() == [[2, 3], [12, 13]]
    assert torch.equal(merge_columns([column_shard(weight, rank, 2) for rank in range(2)]), weight)
    assert torch.equal(merge_rows([row_shard(weight, rank, 4) for rank in range(4)]), weight)


def test_an_odd_vocabulary_is_padded_with_zeros() -> None:
    """5 tokens on 2 ranks: 3 rows each, the last one padding."""
    assert padded_vocab_size(5, 2) == 6 and padded_vocab_size(6, 2) == 6
    shards = [vocabulary_shard(rows(1, 2, 3, 4, 5), rank, 2) for rank in range(2)]
    assert [values(shard) for shard in shards] == [[1, 2, 3], [4, 5, 0]]
    assert values(merge_vocabulary(shards, 5)) == [1, 2, 3, 4, 5]
