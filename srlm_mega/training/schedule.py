"""One pass of a global batch through Megatron's pipeline schedule, forward only or with gradients."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from srlm_mega.kernels.collectives import sum_over_ranks
from srlm_mega.training.batch import Batch
from srlm_mega.training.llama_model import unwrap
from srlm_mega.training.topology import Topology

Loss = tuple[Tensor, Tensor, Tensor]


class MicroBatch(Protocol):
    """A part of the global batch, with its loss."""

    @property
    def batch(self) -> Batch:
        """The model's input."""

    def loss(self, logps: Tensor) -> Loss:
        """Return, from log p of each label [N], the loss summed over items [], the number of items [] (int; the global
        batch's gradient is divided by their sum), and sums to report [n]."""


@dataclass(frozen=True)
class Step:
    """One rank's share of a global batch; shapes are the same on all ranks. Its numbers are the whole batch's."""

    micro_batches: Sequence[MicroBatch]
    lengths: Sequence[int]  # tokens of each sequence
    num_positions: int  # computed by the model, padding included

    @property
    def num_tokens(self) -> int:
        """Number of tokens, without padding."""
        return sum(self.lengths)

    @property
    def padding_fraction(self) -> float:
        """Share of the computed positions that hold no input token."""
        return 1 - (self.num_tokens - len(self.lengths)) / self.num_positions


def forward_backward(model: list[MegatronModule], step: Step, num_sums: int, topology: Topology) -> Tensor:
    """Accumulate the global batch's gradients; return the reported sums [num_sums] over all ranks, fp64."""

    def forward_step(micro_batches: Iterator[MicroBatch], chunk: MegatronModule) -> tuple[Tensor, Callable[..., Loss]]:
        micro_batch = next(micro_batches)

        def loss(logps: Tensor) -> Loss:
            total, count, sums = micro_batch.loss(logps)
            # Context-parallel ranks have the same loss, and Megatron adds up their counts.
            return total, count if topology.cp_rank == 0 else torch.zeros_like(count), sums

        return _logps(micro_batch.batch, chunk), loss

    outputs = _run(model, step.micro_batches, step.micro_batches[0].batch, forward_step, forward_only=False)
    sums = torch.zeros(num_sums, dtype=torch.float64)
    if topology.is_reporter:
        sums = torch.stack(outputs).sum(0)
    return topology.sum_over_world(sums)


def forward(model: list[MegatronModule], batches: Sequence[Batch]) -> list[Tensor]:
    """Return log p of each label [N] per micro batch on the last pipeline stage; nothing on the others."""

    def forward_step(batches: Iterator[Batch], chunk: MegatronModule) -> tuple[Tensor, Callable[..., Tensor]]:
        return _logps(next(batches), chunk), lambda logps, non_loss_data: logps

    with torch.no_grad():
        return _run(model, batches, batches[0], forward_step, forward_only=True)


def _logps(batch: Batch, chunk: MegatronModule) -> Tensor:
    """Return log p [N] on the last pipeline stage, hidden states before it."""
    output: Tensor = chunk(batch.tokens, batch.position_ids, None, labels=batch.labels, packed_seq_params=batch.packed)
    inner = unwrap(chunk)
    if batch.places is None or not inner.post_process:
        return output
    # Under context parallelism each rank has computed the log p of its own positions. By places, not by a mask: for the
    # gradient by a mask the host would wait on a GPU.
    padded = torch.cat([output, output.new_zeros(1)])
    return sum_over_ranks(padded.index_select(0, batch.places), inner.pg_collection.cp)


def _run(
    model: list[MegatronModule],
    micro_batches: Sequence[object],
    first: Batch,
    forward_step: Callable[..., object],
    forward_only: bool,
) -> list[Tensor]:
    rows, positions = first.tokens.shape
    iterators = [iter(micro_batches) for _ in model]  # every model chunk sees every micro batch
    outputs: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model,
        num_microbatches=len(micro_batches),
        seq_length=positions * unwrap(model[0]).config.context_parallel_size,
        micro_batch_size=rows,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return outputs
