"""From token ids to padded batches: the same order, shapes and counts on every rank.

Every rank knows the whole global batch (the order is a function of the seed), takes its own share, and pads to the
longest sequence of the global batch, so that all pipeline stages agree on shapes without talking.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy
import torch
from torch import Tensor

from srlm_mega.config import TrainingConfig
from srlm_mega.errors import UserError

LENGTH_MULTIPLE = 8  # of input positions; tensor cores like it, and sequence parallelism splits it over TP ranks
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Token ids of which `tokens[num_prompt:]` are learnt. With `num_prompt` 0 or 1 every predicted token is."""

    id: str
    tokens: tuple[int, ...]
    num_prompt: int

    def __post_init__(self) -> None:
        if self.num_targets < 1:
            raise UserError(
                f"{self.id}: nothing to learn, {len(self.tokens)} tokens of which {self.num_prompt} are the prompt: "
                "remove this empty completion"
            )

    @property
    def num_targets(self) -> int:
        """Tokens that enter the loss. The first token has nothing before it to be predicted from."""
        return len(self.tokens) - max(self.num_prompt, 1)

    @property
    def longest(self) -> int:
        """Its length in tokens."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class PairSequences:
    """Two completions of one prompt."""

    id: str
    chosen: TokenSequence
    rejected: TokenSequence

    @property
    def longest(self) -> int:
        """Length in tokens of the longer one."""
        return max(self.chosen.longest, self.rejected.longest)


class Sized(Protocol):
    """Something with a longest sequence."""

    @property
    def longest(self) -> int:
        """Length in tokens."""


SizedT = TypeVar("SizedT", bound=Sized)


@dataclass(frozen=True)
class Batch:
    """Padded sequences, all [b, s]: `labels[i, j]` is what follows `tokens[i, j]`; `loss_mask` is 1.0 where
    that counts."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor


def collate(sequences: Sequence[TokenSequence], length: int, device: torch.device) -> Batch:
    """Pad to `length` input positions on the right. Padding is token 0 and counts nowhere."""
    num_rows = len(sequences)
    tokens = torch.zeros(num_rows, length + 1, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        assert sequence.longest <= length + 1, f"{sequence.id}: {sequence.longest} tokens do not fit {length} inputs"
        tokens[row, : sequence.longest] = torch.tensor(sequence.tokens)
    ends = torch.tensor([[sequence.longest - 1] for sequence in sequences])
    starts = torch.tensor([[max(sequence.num_prompt, 1) - 1] for sequence in sequences])
    positions = torch.arange(length).expand(num_rows, length)
    loss_mask = ((positions >= starts) & (positions < ends)).float()
    return Batch(
        tokens=tokens[:, :-1].contiguous().to(device),
        labels=tokens[:, 1:].contiguous().to(device),
        loss_mask=loss_mask.to(device),
        position_ids=positions.to(device),
    )


def padded_length(items: Sequence[Sized], tp_size: int) -> int:
    """Input positions that hold every sequence (one less than its tokens), rounded up to a multiple of 8 and TP."""
    multiple = math.lcm(LENGTH_MULTIPLE, tp_size)
    inputs = max(item.longest for item in items) - 1
    return -(-inputs // multiple) * multiple


def within(items: Sequence[SizedT], seq_length: int) -> list[SizedT]:
    """The items no longer than `seq_length` tokens. Too long ones are left out whole, never cut."""
    return [item for item in items if item.longest <= seq_length]


def num_steps(section: TrainingConfig, num_items: int) -> int:
    """Optimiser steps of a stage. UserError when the data do not fill one batch."""
    steps = section.train_iters
    if steps is None:
        assert section.epochs is not None, "one of train_iters and epochs is set"
        steps = section.epochs * num_items // section.global_batch_size
    if num_items == 0 or steps == 0:
        raise UserError(
            f"{num_items} items do not fill one batch of {section.global_batch_size}: "
            "lower global_batch_size, or give more data"
        )
    return steps


def batch_order(num_items: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of item numbers: one shuffled pass after another, each differently shuffled.

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


def own_share(items: Sequence[T], dp_rank: int, dp_size: int, micro_batch_size: int) -> list[Sequence[T]]:
    """The micro batches of one data-parallel rank: an equal, contiguous part of the global batch."""
    per_rank = len(items) // dp_size
    assert per_rank * dp_size == len(items) and per_rank % micro_batch_size == 0, (
        f"a batch of {len(items)} does not split into {dp_size} ranks with micro batches of {micro_batch_size}"
    )
    own = items[dp_rank * per_rank : (dp_rank + 1) * per_rank]
    return [own[start : start + micro_batch_size] for start in range(0, per_rank, micro_batch_size)]
