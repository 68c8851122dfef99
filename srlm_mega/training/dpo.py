"""Direct preference optimisation (Rafailov et al. 2023) and its relatives, optionally with RPO's NLL term."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, assert_never

import torch
from torch import Tensor

from srlm_mega.config.training import DpoConfig, TrainerConfig
from srlm_mega.errors import UserError
from srlm_mega.kernels import checks
from srlm_mega.kernels.ops import DpoSettings, dpo_loss
from srlm_mega.records import ReferenceLogprobs
from srlm_mega.training.batch import Batch, PairSequences
from srlm_mega.training.schedule import Loss, Step
from srlm_mega.training.split import split
from srlm_mega.training.topology import Topology


@dataclass(frozen=True)
class DpoMicroBatch:
    """P pairs of one forward pass: sequence 2i of `batch` is pair i's chosen one, sequence 2i + 1 its rejected one.

    `ref_logps` [2P] belong to these sequences, in nats. `consistency` [P] is None where every pair's is 1.
    """

    batch: Batch
    ref_logps: Tensor
    settings: DpoSettings
    consistency: Tensor | None = None

    def loss(self, logps: Tensor) -> Loss:
        """Return the pairs' summed loss [], their number [], and the sums [8] that `DpoObjective.metrics` reads."""
        num_pairs = len(self.ref_logps) // 2
        out = dpo_loss(
            logps,
            self.batch.cu_seqlens,
            torch.arange(2 * num_pairs, device=logps.device).view(num_pairs, 2),
            self.ref_logps,
            self.settings,
            self.consistency,
        )
        return out.loss, torch.full((), num_pairs, dtype=torch.int, device=logps.device), out.sums.double()


@dataclass(frozen=True)
class DpoObjective:
    """Data, loss and metrics of DPO. `reference[i]` belongs to pair `items[i]`; UserError where its id is another."""

    items: Sequence[PairSequences]
    reference: Sequence[ReferenceLogprobs]
    section: DpoConfig
    topology: Topology
    vocab_size: int
    tolerance: float | None  # of the first step's loss; None: no check
    num_sums: ClassVar[int] = 8

    def __post_init__(self) -> None:
        check_reference_ids(self.items, self.reference)

    def prepare(self, indices: Sequence[int]) -> Step:
        """Return this rank's share of the global batch with these items."""
        pairs = [self.items[index] for index in indices]
        cut = split(pairs, self.section, self.topology)
        settings = DpoSettings(
            beta=self.section.beta,
            loss_type=self.section.loss_type,
            label_smoothing=self.section.label_smoothing,
            rpo_alpha=self.section.rpo_alpha,
            chosen_tokens_per_pair=sum(pair.chosen.num_targets for pair in pairs) / len(pairs),
        )
        micro_batches = [
            DpoMicroBatch(
                batch=batch,
                ref_logps=self._reference([indices[place] for place in part]),
                settings=settings,
                consistency=self._consistency([pairs[place] for place in part]),
            )
            for part, batch in zip(cut.micro_batches, cut.batches(self.vocab_size), strict=True)
        ]
        return Step(micro_batches, cut.lengths, cut.num_positions)

    def _reference(self, indices: Sequence[int]) -> Tensor:
        records = [self.reference[index] for index in indices]
        logps = [logp for record in records for logp in (record.chosen, record.rejected)]
        return torch.tensor(logps, device=self.topology.device)

    @cached_property
    def is_weighed(self) -> bool:
        """True when any pair of the whole data, not only of one batch, has a consistency below 1."""
        return any(pair.consistency < 1 for pair in self.items)

    def _consistency(self, pairs: Sequence[PairSequences]) -> Tensor | None:
        if not self.is_weighed:
            return None
        consistency = torch.tensor([pair.consistency for pair in pairs])
        checks.check_shares(consistency)  # here, on the CPU: on a GPU values are never read
        return consistency.to(self.topology.device)

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Return TRL's metrics from the sums over all ranks [8]. Rewards and logps (nats) are means over pairs."""
        loss, chosen_rewards, rejected_rewards, wins, chosen, rejected, chosen_tokens, pairs = sums.tolist()
        nll = -chosen / chosen_tokens
        metrics = {
            "loss": loss / pairs + self.section.rpo_alpha * nll,
            "rewards/chosen": chosen_rewards / pairs,
            "rewards/rejected": rejected_rewards / pairs,
            "rewards/accuracies": wins / pairs,
            "rewards/margins": (chosen_rewards - rejected_rewards) / pairs,
            "logps/chosen": chosen / pairs,
            "logps/rejected": rejected / pairs,
        }
        return metrics | {"nll_loss": nll} if self.section.rpo_alpha > 0 else metrics

    def check_first_step(self, metrics: dict[str, float]) -> None:
        """Raise UserError unless the first step's margins are 0, within `tolerance`.

        Before the first update policy and reference are one model. With dropout nothing is checked.
        """
        tolerance = self.tolerance
        if self.section.attention_dropout > 0 or self.section.hidden_dropout > 0 or tolerance is None:
            return
        due = loss_without_margin(self.section)
        loss = metrics["loss"] - self.section.rpo_alpha * metrics.get("nll_loss", 0.0)
        margin = metrics["rewards/margins"]
        if abs(loss - due) > tolerance * max(1.0, due) or abs(margin) > 2 * tolerance:
            raise UserError(
                f"the first DPO loss is {loss:.6f} (margin {margin:.2e}), expected {due:.6f} (margin 0) within "
                f"{tolerance:g}: the reference log-probabilities are not the starting model's. Compute them again "
                "from the model that training starts from"
            )


def first_step_tolerance(trainer: TrainerConfig) -> float | None:
    """Return how far the first step's loss may be from the one without margins; None in FP8.

    In FP8 a log-probability depends on the rest of its batch (tensors share a scale), and the reference pass has other
    batches: there the shadow check watches.
    """
    if trainer.fp8 is not None:
        return None
    return 2e-2 if trainer.bf16 else 1e-4


def loss_without_margin(section: DpoConfig) -> float:
    """Return the loss of a pair whose margin is 0."""
    match section.loss_type:
        case "hinge":
            return 1.0
        case "ipo":
            return 1 / (4 * section.beta**2)
        case "sigmoid" | "robust":
            return math.log(2)
        case _:
            assert_never(section.loss_type)


def check_reference_ids(pairs: Sequence[PairSequences], reference: Sequence[ReferenceLogprobs]) -> None:
    """Raise UserError unless every pair has its reference, in the same order."""
    if len(pairs) != len(reference):
        raise UserError(
            f"{len(pairs)} pairs but {len(reference)} reference log-probabilities: compute the reference again"
        )
    for pair, record in zip(pairs, reference, strict=True):
        if pair.id != record.pair_id:
            raise UserError(
                f"pair {pair.id} has the reference of {record.pair_id}: compute the reference again for these pairs"
            )
