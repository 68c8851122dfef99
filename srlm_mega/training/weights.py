"""Loading and saving Hugging Face folders with a model that is split over processes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from srlm_mega.checkpoints_conversion.huggingface import FolderWriter, open_weights
from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.checkpoints_conversion.megatron import held_tensors, load_shard, merge_tensor
from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.training.layer_torch import unfused_name
from srlm_mega.training.llama_model import unwrap
from srlm_mega.training.model import all_placements, gather_weights, own_placements
from srlm_mega.training.topology import Topology


def load_weights(model: Sequence[MegatronModule], shape: LlamaShape, folder: Path, topology: Topology) -> None:
    """Fill the model's chunks from a Hugging Face folder; every rank reads only what it holds. UserError when the
    folder does not have the tensors of this shape."""
    try:
        fill_weights(model, shape, open_weights(folder), topology)
    except ValueError as error:  # checkpoints_conversion does not import UserError
        raise UserError(str(error)) from None


def fill_weights(
    model: Sequence[MegatronModule], shape: LlamaShape, weights: Mapping[str, Tensor], topology: Topology
) -> None:
    """Fill the model's chunks from weights by Hugging Face names; a rank reads only what it holds."""
    for chunk, placement in zip(model, own_placements(shape, topology), strict=True):
        shard = load_shard(weights, shape, placement)
        parameters = _named(chunk)
        assert shard.keys() == parameters.keys(), (
            f"weights and model differ in {sorted(shard.keys() ^ parameters.keys())}"
        )
        for name, parameter in parameters.items():
            assert parameter.shape == shard[name].shape, (
                f"{name} is {tuple(parameter.shape)} in the model, {tuple(shard[name].shape)} in the weights"
            )
            parameter.data.copy_(shard[name])


def save_weights(
    model: Sequence[MegatronModule], shape: LlamaShape, folder: Path, start: Path, topology: Topology
) -> None:
    """Write the trained model as a Hugging Face folder, with the tokenizer of `start`. The main rank writes one tensor
    after another: it never holds the whole model."""
    gather_weights(model)
    own = {
        place.layers: (place.tp_rank, _state(chunk))
        for place, chunk in zip(own_placements(shape, topology), model, strict=True)
    }
    (dtype,) = {tensor.dtype for _, state in own.values() for tensor in state.values()}
    writer = FolderWriter(folder, shape, dtype, tokenizer_from=start) if topology.is_main else None
    written_embedding = torch.empty(0)
    for chunk in (place for place in all_placements(shape, topology) if place.tp_rank == 0):
        for held in held_tensors(shape, chunk):
            mine = own.get(chunk.layers)
            # A copy: a view would be pickled with the whole of its buffer.
            shards = topology.gather_model((mine[0], mine[1][held.name].clone()) if mine else None)
            if writer is None:
                continue
            parts = merge_tensor(held.layout, _in_order(shards, held.name, topology.tp_size), shape)
            if held.name == "output_layer.weight" and shape.tie_word_embeddings:
                assert torch.equal(parts[0], written_embedding), "the tied output is not the embedding"
                continue
            if held.name == "embedding.word_embeddings.weight" and shape.tie_word_embeddings:
                (written_embedding,) = parts
            for name, part in zip(held.parts, parts, strict=True):
                writer.write(name, part)
    if writer is not None:
        writer.finish()


def verify_export(model: Sequence[MegatronModule], shape: LlamaShape, folder: Path, topology: Topology) -> int:
    """Read an exported folder back: every rank compares its part bit by bit with what it trained. Return the number of
    tensors over all ranks. CannotContinue when one differs."""
    differing = []
    num_tensors = 0
    for chunk, placement in zip(model, own_placements(shape, topology), strict=True):
        read = load_shard(open_weights(folder), shape, placement)
        for name, trained in _state(chunk).items():
            num_tensors += 1
            if not torch.equal(read[name], trained):
                differing.append(name)
    everywhere = [name for names in topology.all_gather(differing) for name in names]
    if everywhere:
        raise CannotContinue(
            f"{folder} does not hold what was trained: {', '.join(everywhere[:3])} differ (of {len(everywhere)}). "
            "Check the disk, then run the same command again: training resumes from its checkpoint"
        )
    return int(topology.sum_over_world(torch.tensor(num_tensors)))


def _in_order(shards: Sequence[tuple[int, Tensor] | None], name: str, tp_size: int) -> list[Tensor]:
    """Return the tensors of all tensor-parallel ranks in order, from (rank, tensor) of the processes that have one."""
    by_rank = dict(shard for shard in shards if shard is not None)
    assert sorted(by_rank) == list(range(tp_size)), f"{name} came from ranks {sorted(by_rank)}"
    return [by_rank[rank] for rank in range(tp_size)]


def _state(chunk: MegatronModule) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu() for name, parameter in _named(chunk).items()}


def _named(chunk: MegatronModule) -> dict[str, nn.Parameter]:
    return {unfused_name(name): parameter for name, parameter in unwrap(chunk).named_parameters()}
