"""Supervised fine-tuning (and pre-training of the toy): mean -log p over the global batch's target tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from srlm_mega.config.training import OptimizationConfig
from srlm_mega.training.batch import Batch, TokenSequence
from srlm_mega.training.schedule import Loss, Step
from srlm_mega.training.split import split
from srlm_mega.training.topology import Topology


@dataclass(frozen=True)
class SftMicroBatch:
    """The sequences of one forward pass."""

    batch: Batch

    def loss(self, logps: Tensor) -> Loss:
        """Return the summed -log p [] of the targets [N], their number [], and both to report [2]."""
        total = -logps.sum()
        count = torch.full((), len(logps), device=logps.device)
        return total, count.int(), torch.stack([total.detach(), count]).double()


@dataclass(frozen=True)
class SftObjective:
    """Data, loss and metrics of supervised training."""

    items: Sequence[TokenSequence]
    section: OptimizationConfig
    topology: Topology
    vocab_size: int
    num_sums: ClassVar[int] = 2

    def prepare(self, indices: Sequence[int]) -> Step:
        """Return this rank's share of the global batch with these items."""
        cut = split([self.items[index] for index in indices], self.section, self.topology)
        micro_batches = [SftMicroBatch(batch) for batch in cut.batches(self.vocab_size)]
        return Step(micro_batches, cut.lengths, cut.num_positions)

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Return TRL's metrics from the sums over all ranks [2]. The loss is in nats per target token."""
        total, count = sums.tolist()
        return {"loss": total / count}

    def check_first_step(self, metrics: dict[str, float]) -> None:
        """Check nothing: any first supervised loss is possible."""
