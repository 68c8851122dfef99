"""Hugging Face weights <-> the parts of a megatron-core GPTModel that one rank holds.

Names are those of `GPTModel.state_dict()` with a layer spec whose norms are modules of their own. `shard_tensor` and
`merge_tensor` convert one row of the table, so everything works tensor by tensor.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

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
    row_shard,
    split_qkv,
    vocabulary_shard,
)
from srlm_mega.checkpoints_conversion.llama import (
    Holder,
    Layout,
    LlamaShape,
    check_names,
    check_size,
    table,
)
from srlm_mega.checkpoints_conversion.placement import Placement, check_split


@dataclass(frozen=True)
class HeldTensor:
    """A tensor of a chunk: its row of the table with the layer numbers filled in."""

    name: str
    layout: Layout
    parts: dict[str, tuple[int, ...]]  # the Hugging Face tensors it is made of: name -> shape


def held_tensors(shape: LlamaShape, placement: Placement) -> Iterator[HeldTensor]:
    """Yield the tensors of a chunk. A tied output is the embedding's tensor where one stage holds both, else a copy."""
    for row in table(shape):
        if row.holder is Holder.ITS_LAYER:
            for local, layer in enumerate(placement.layers):
                parts = {name.format(layer=layer): size for name, size in row.huggingface.items()}
                yield HeldTensor(row.megatron.format(layer=local), row.layout, parts)
        elif (row.holder is Holder.FIRST_STAGE and placement.first_stage) or (
            row.holder is Holder.LAST_STAGE and placement.last_stage
        ):
            shared = row.megatron == "output_layer.weight" and shape.tie_word_embeddings and placement.first_stage
            if not shared:
                yield HeldTensor(row.megatron, row.layout, row.huggingface)


def shard_tensor(layout: Layout, parts: Sequence[Tensor], shape: LlamaShape, tp_rank: int, tp_size: int) -> Tensor:
    """Make the Megatron tensor of one rank from a row's whole Hugging Face tensors (a view where nothing moves)."""
    match layout:
        case Layout.QKV:
            q, k, v = (column_shard(part, tp_rank, tp_size) for part in parts)
            return fuse_qkv(q, k, v, shape.num_query_groups // tp_size)
        case Layout.GATE_UP:
            gate, up = parts
            return gate_up_shard(gate, up, tp_rank, tp_size)
        case Layout.COLUMN:
            return column_shard(parts[0], tp_rank, tp_size)
        case Layout.VOCABULARY:
            return vocabulary_shard(parts[0], tp_rank, tp_size)
        case Layout.ROW:
            return row_shard(parts[0], tp_rank, tp_size)
        case Layout.REPLICATED:
            return parts[0]


def merge_tensor(layout: Layout, shards: Sequence[Tensor], shape: LlamaShape) -> tuple[Tensor, ...]:
    """Inverse of `shard_tensor`, from the tensors of all ranks in order. ValueError when replicas differ."""
    match layout:
        case Layout.QKV:
            return split_qkv(merge_columns(shards), shape.num_attention_heads, shape.num_query_groups)
        case Layout.GATE_UP:
            return merge_gate_up(shards)
        case Layout.COLUMN:
            return (merge_columns(shards),)
        case Layout.VOCABULARY:
            return (merge_vocabulary(shards, shape.vocab_size),)
        case Layout.ROW:
            return (merge_rows(shards),)
        case Layout.REPLICATED:
            for rank, shard in enumerate(shards):
                if not torch.equal(shard, shards[0]):
                    raise ValueError(f"differs between tensor-parallel ranks 0 and {rank}, and should be a replica")
            return (shards[0],)


def load_shard(weights: Mapping[str, Tensor], shape: LlamaShape, placement: Placement) -> dict[str, Tensor]:
    """Make one rank's tensors of one chunk, by Megatron's names. ValueError for wrong names or shapes of `weights`."""
    check_split(shape, placement.tp_size, pp=1)
    check_names(weights, shape, "the model")
    shard = {}
    for held in held_tensors(shape, placement):
        parts = [weights[name] for name in held.parts]
        for part, (name, size) in zip(parts, held.parts.items(), strict=True):
            check_size(name, tuple(part.shape), size, "the model")
        tensor = shard_tensor(held.layout, parts, shape, placement.tp_rank, placement.tp_size)
        shard[held.name] = tensor.contiguous()
    return shard
