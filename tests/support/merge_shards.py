"""The whole model from the parts of its ranks, all in memory: the slow twin of what streams checkpoints."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from srlm_mega.checkpoints_conversion.llama import LlamaShape, check_names, check_size, huggingface_shapes
from srlm_mega.checkpoints_conversion.megatron import held_tensors, merge_tensor
from srlm_mega.checkpoints_conversion.placement import Placement


def merge_shards(shards: Sequence[tuple[Placement, Mapping[str, Tensor]]], shape: LlamaShape) -> dict[str, Tensor]:
    """The whole model by Hugging Face names, from every chunk on every tensor-parallel rank, in any order.

    ValueError when a chunk or rank is missing or there twice, when a tensor is missing or unknown, or when replicas
    (norms, the two copies of a tied embedding) differ.
    """
    merged: dict[str, Tensor] = {}
    for chunk in _by_chunk(shards):
        placement = chunk[0][0]
        _check_shard_names(chunk, shape)
        for held in held_tensors(shape, placement):
            try:
                parts = merge_tensor(held.layout, [tensors[held.name] for _, tensors in chunk], shape)
            except ValueError as error:
                raise ValueError(f"{held.name} (layers {_span(placement)}) {error}") from None
            for part, (name, size) in zip(parts, held.parts.items(), strict=True):
                check_size(name, tuple(part.shape), size, f"layers {_span(placement)}")
                if name in merged and not torch.equal(merged[name], part):
                    raise ValueError(f"{held.name} is another tensor than {name}, and should be a copy: tied output")
                merged[name] = part.contiguous()
    check_names(merged, shape, "the set of model chunks")
    return {name: merged[name] for name in huggingface_shapes(shape)}


def _by_chunk(
    shards: Sequence[tuple[Placement, Mapping[str, Tensor]]],
) -> list[list[tuple[Placement, Mapping[str, Tensor]]]]:
    """The shards of each chunk in the order of their tensor-parallel ranks, chunks in the order of their layers."""
    chunks: dict[tuple[int, ...], list[tuple[Placement, Mapping[str, Tensor]]]] = {}
    for placement, tensors in shards:
        chunks.setdefault(placement.layers, []).append((placement, tensors))
    for members in chunks.values():
        members.sort(key=lambda member: member[0].tp_rank)
        ranks = [placement.tp_rank for placement, _ in members]
        tp_size = members[0][0].tp_size
        if ranks != list(range(tp_size)):
            raise ValueError(
                f"layers {_span(members[0][0])} came from tensor-parallel ranks {ranks}, due were 0 to {tp_size - 1}"
            )
    return [chunks[layers] for layers in sorted(chunks)]


def _check_shard_names(chunk: Sequence[tuple[Placement, Mapping[str, Tensor]]], shape: LlamaShape) -> None:
    for placement, tensors in chunk:
        wanted = {held.name for held in held_tensors(shape, placement)}
        # Transformer Engine's modules put their own records, which are no weights, into a state_dict.
        found = {name for name in tensors if not name.endswith("_extra_state")}
        if found != wanted:
            raise ValueError(
                f"layers {_span(placement)} of tensor-parallel rank {placement.tp_rank} "
                f"lack {sorted(wanted - found)[:3]} and have unknown {sorted(found - wanted)[:3]}"
            )


def _span(placement: Placement) -> str:
    return f"{placement.layers[0]}-{placement.layers[-1]}"
