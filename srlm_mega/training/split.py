"""The split of a global batch into the micro batches of each rank: fixed numbers of items, or packs of equal size.

Every rank knows the whole global batch (its order is a function of the seed), so all agree on shapes and numbers
without communication.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy

from srlm_mega.config.training import OptimizationConfig
from srlm_mega.errors import UserError
from srlm_mega.training.batch import Batch, TokenSequence, context_part, packed_batch, padded_batch
from srlm_mega.training.packing import LENGTH_MULTIPLE, Pipelines, cut_into_packs, number_of_parts
from srlm_mega.training.topology import Topology


class Item(Protocol):
    """A sequence, or a pair of them."""

    @property
    def id(self) -> str:
        """The item's name."""

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        """The sequences that must be in one forward pass."""


ItemT = TypeVar("ItemT", bound=Item)


@dataclass(frozen=True)
class Split:
    """A global batch in micro batches. All of them, on all ranks, have the shape [num_rows, length]."""

    items: Sequence[Item]  # the global batch
    micro_batches: list[list[int]]  # this rank's: places in the global batch; some may be empty
    num_rows: int
    length: int
    packed: bool
    num_positions: int  # of all ranks, padding included
    topology: Topology

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence of the global batch."""
        return [len(sequence.tokens) for sequence in flat(self.items)]

    def batches(self, vocab_size: int) -> list[Batch]:
        """Return this rank's micro batches in the common shape, on its device. ValueError for a target that is not a
        token of the model's vocabulary."""
        return [self._batch(flat([self.items[place] for place in part]), vocab_size) for part in self.micro_batches]

    def _batch(self, sequences: Sequence[TokenSequence], vocab_size: int) -> Batch:
        topology = self.topology
        if self.packed:
            batch = packed_batch(sequences, self.length)
        else:
            batch = padded_batch(sequences, self.num_rows, self.length)
        if topology.cp_size > 1:
            batch = context_part(batch, topology.cp_rank, topology.cp_size)
        return batch.to(topology.device, vocab_size)


def split(items: Sequence[Item], section: OptimizationConfig, topology: Topology) -> Split:
    """Split a global batch, for this rank."""
    chunks = topology.parallel.virtual_pipeline_model_parallel_size or 1
    pipelines = Pipelines(topology.dp_size, topology.pp_size, chunks)
    multiple = math.lcm(LENGTH_MULTIPLE * topology.tp_size * topology.cp_size, topology.length_multiple)
    is_packed = section.packed_sequence_size is not None
    if not is_packed:
        parts = even_parts(len(items), section.micro_batch_size, pipelines.multiple)
        num_rows = section.micro_batch_size * len(items[0].sequences)
        length = max(sequence.num_inputs for sequence in flat(items))
    else:
        weights = [num_inputs(item) for item in items]
        parts = cut_into_packs(weights, section, pipelines)
        num_rows, length = 1, sum(weights[place] for place in parts[0])
    length = -(-length // multiple) * multiple
    return Split(
        items=items,
        micro_batches=parts[topology.dp_rank :: topology.dp_size],
        num_rows=num_rows,
        length=length,
        packed=is_packed,
        num_positions=len(parts) * num_rows * length,
        topology=topology,
    )


def flat(items: Sequence[Item]) -> list[TokenSequence]:
    """Return the sequences of all items; of a pair, the chosen one comes first."""
    return [sequence for item in items for sequence in item.sequences]


def num_inputs(item: Item) -> int:
    """Return the input positions of all the item's sequences."""
    return sum(sequence.num_inputs for sequence in item.sequences)


def even_parts(num_items: int, size: int, multiple: int) -> list[list[int]]:
    """Split item numbers, in order, into a multiple of `multiple` parts of at most `size`, as equal as possible."""
    parts = numpy.array_split(numpy.arange(num_items), number_of_parts(num_items, size, multiple))
    return [part.tolist() for part in parts]


def within(items: Sequence[ItemT], seq_length: int) -> list[ItemT]:
    """Return the items whose sequences have at most `seq_length` tokens. Longer ones are left out whole, never cut."""
    return [item for item in items if all(len(sequence.tokens) <= seq_length for sequence in item.sequences)]


def num_steps(section: OptimizationConfig, num_items: int, num_too_long: int = 0) -> int:
    """Return the number of optimizer steps of a stage; `num_too_long` items besides were left out for their length.
    UserError when the data do not fill one batch."""
    if num_items < section.min_items:
        number, remedy = f"{num_items}", "lower global_batch_size, or give more data"
        if num_too_long:
            number = f"{num_items} of {num_items + num_too_long}"
            remedy = f"Raise it, or {remedy if num_items else 'give shorter texts'}"
            remedy = f"{num_too_long} are longer than model.seq_length and left out whole. {remedy}"
        raise UserError(f"{number} items do not fill one batch of {section.global_batch_size}: {remedy}")
    return section.train_iters or (section.epochs or 1) * num_items // section.global_batch_size


def steps_on(items: Sequence[Item], section: OptimizationConfig, seq_length: int) -> int:
    """Return the number of optimizer steps of a stage that is given these items. UserError when those that are not too
    long do not fill one batch."""
    num_kept = len(within(items, seq_length))
    return num_steps(section, num_kept, len(items) - num_kept)


def batch_order(num_items: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of item numbers without end: one shuffled pass after another, each shuffled differently.

    Passes follow each other without a gap, so a batch may hold the end of one and the start of the next.
    """
    epoch = 0
    pending: list[int] = []
    while True:
        while len(pending) < batch_size:
            pending.extend(numpy.random.default_rng([seed, epoch]).permutation(num_items).tolist())
            epoch += 1
        yield pending[:batch_size]
        pending = pending[batch_size:]
