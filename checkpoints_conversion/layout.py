"""The layout of matrices under tensor parallelism: pure functions with their inverses.

A weight is [outputs, inputs] or any slice of it; d is the size of a head, nh the attention heads, ng the query groups
(key/value heads). Column-parallel layers split outputs, row-parallel layers inputs (Megatron's words).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from srlm_mega.checkpoints_conversion.placement import padded_vocab_size


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, num_query_groups: int) -> Tensor:
    """[nh * d, h], [ng * d, h], [ng * d, h] -> [(nh + 2 ng) * d, h]: per group its nh / ng queries, its key, its value,
    so that any split into whole groups gives a rank the heads that belong together."""
    groups = [part.unflatten(0, (num_query_groups, -1)) for part in (q, k, v)]
    return torch.cat(groups, dim=1).flatten(0, 1)


def split_qkv(qkv: Tensor, num_attention_heads: int, num_query_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `fuse_qkv`."""
    queries = num_attention_heads // num_query_groups
    groups = qkv.unflatten(0, (num_query_groups, queries + 2, -1))
    q, k, v = groups.split([queries, 1, 1], dim=1)
    return q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)


def column_shard(weight: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """[outputs, ...] -> this rank's [outputs / tp, ...]."""
    return _shard(weight, 0, tp_rank, tp_size)


def merge_columns(shards: Sequence[Tensor]) -> Tensor:
    """Inverse of `column_shard`, over all ranks in order."""
    return torch.cat(list(shards), dim=0)


def vocabulary_shard(weight: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """[v, h] -> this rank's rows of the padded vocabulary [padded v / tp, h]; padding is 0. A softmax must leave padded
    rows out: a logit of 0 is not a small one."""
    padding = padded_vocab_size(len(weight), tp_size) - len(weight)
    padded = torch.cat([weight, weight.new_zeros(padding, *weight.shape[1:])]) if padding else weight
    return column_shard(padded, tp_rank, tp_size)


def merge_vocabulary(shards: Sequence[Tensor], vocab_size: int) -> Tensor:
    """Inverse of `vocabulary_shard`, over all ranks in order."""
    return merge_columns(shards)[:vocab_size]


def row_shard(weight: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """[outputs, inputs] -> this rank's [outputs, inputs / tp]."""
    return _shard(weight, 1, tp_rank, tp_size)


def merge_rows(shards: Sequence[Tensor]) -> Tensor:
    """Inverse of `row_shard`, over all ranks in order."""
    return torch.cat(list(shards), dim=1)


def gate_up_shard(gate: Tensor, up: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """Two [ffn, h] -> this rank's [2 ffn / tp, h]: its gate rows above its up rows. Splitting the stacked [2 ffn, h]
    instead would give the first ranks only gates and the last ones only ups."""
    return torch.cat([column_shard(gate, tp_rank, tp_size), column_shard(up, tp_rank, tp_size)])


def merge_gate_up(shards: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Inverse of `gate_up_shard`, over all ranks in order."""
    halves = [shard.chunk(2, dim=0) for shard in shards]
    return torch.cat([gate for gate, _ in halves]), torch.cat([up for _, up in halves])


def _shard(weight: Tensor, dim: int, tp_rank: int, tp_size: int) -> Tensor:
    size = weight.size(dim)
    assert size % tp_size == 0, f"{size} does not divide by TP {tp_size}: check the placement first"
    return weight.narrow(dim, tp_rank * (size // tp_size), size // tp_size)
