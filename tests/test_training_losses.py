"""SFT and DPO losses with numbers worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from srlm_mega.config import DpoConfig, ParallelConfig, TrainingConfig
from srlm_mega.kernels.reference import dpo_loss, dpo_margins
from srlm_mega.records import ReferenceLogprobs
from srlm_mega.training.batch import Batch, PairSequences, TokenSequence
from srlm_mega.training.dpo import DpoMicroBatch, DpoObjective, check_reference_ids
from srlm_mega.training.sft import SftMicroBatch, SftObjective
from srlm_mega.training.topology import Topology

TOPOLOGY = Topology(0, 1, torch.device("cpu"), 0, 1, 0, 1, 0, 1, ParallelConfig())


def batch(loss_mask: list[list[float]]) -> Batch:
    mask = torch.tensor(loss_mask)
    return Batch(tokens=mask.long(), labels=mask.long(), loss_mask=mask, position_ids=mask.long())


def pair(name: str) -> PairSequences:
    return PairSequences(name, TokenSequence("c", (1, 2, 3, 4), 1), TokenSequence("r", (1, 5), 1))


def dpo_objective(rpo_alpha: float = 0.0, dropout: float = 0.0, bf16: bool = False) -> DpoObjective:
    section = DpoConfig(
        train_iters=1,
        lr=1e-3,
        min_lr=0,
        micro_batch_size=1,
        global_batch_size=2,
        rpo_alpha=rpo_alpha,
        attention_dropout=0,
        hidden_dropout=dropout,
    )
    reference = [ReferenceLogprobs("a", -3.0, -2.0), ReferenceLogprobs("b", -4.0, -1.0)]
    return DpoObjective([pair("a"), pair("b")], reference, section, TOPOLOGY, bf16)


def test_sft_counts_masked_tokens_only() -> None:
    """1 + 2 + 8 = 11 over 3 tokens; the 4s and the 16 are prompt and padding."""
    micro_batch = SftMicroBatch(batch([[0, 1, 1, 0], [0, 0, 1, 0]]))
    total, count, reported = micro_batch.loss(torch.tensor([[4.0, 1, 2, 4], [4, 4, 8, 16]]))
    assert (total.item(), count.item(), reported.tolist()) == (11.0, 3, [11.0, 3.0])


def test_sft_mean_is_over_all_tokens_not_over_sequences() -> None:
    """Means per sequence would give (1.5 + 8) / 2 = 4.75."""
    section = TrainingConfig(train_iters=1, lr=1e-3, min_lr=0)
    metrics = SftObjective([], section, TOPOLOGY).metrics(torch.tensor([11.0, 3.0]))
    assert metrics["loss"] == pytest.approx(11 / 3)


def test_dpo_loss_by_hand() -> None:
    """Margin (-10 + 12) - (-9 + 8) = 3; beta 0.1: -log sigmoid(0.3) = log(1 + e^-0.3) = 0.554355."""
    margins = dpo_margins(*(torch.tensor([value]) for value in (-10.0, -9.0, -12.0, -8.0)))
    assert margins.tolist() == [3.0]
    assert dpo_loss(margins, 0.1).item() == pytest.approx(0.554355, abs=1e-6)
    assert dpo_loss(-margins, 0.1).item() == pytest.approx(0.854355, abs=1e-6)  # 0.3 more: chosen and rejected swapped
    assert dpo_loss(torch.zeros(1), 0.1).item() == pytest.approx(math.log(2))


def test_dpo_gradient_by_hand() -> None:
    """d loss / d chosen = -beta * sigmoid(-beta * margin) = -0.1 * 0.425557; the opposite for rejected."""
    chosen, rejected = torch.tensor([-10.0], requires_grad=True), torch.tensor([-9.0], requires_grad=True)
    dpo_loss(dpo_margins(chosen, rejected, torch.tensor([-12.0]), torch.tensor([-8.0])), 0.1).sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.0425557, abs=1e-7)
    assert rejected.grad.item() == pytest.approx(0.0425557, abs=1e-7)


def two_pairs(nll_weight: float) -> tuple[DpoMicroBatch, Tensor]:
    """Chosen log p: -(1 + 2) = -3 and -5; rejected -4 and -(2 + 2) = -4; references 0 but for the first chosen, -6."""
    micro_batch = DpoMicroBatch(
        batch=batch([[1, 1, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]]),
        ref_chosen=torch.tensor([-6.0, 0.0]),
        ref_rejected=torch.zeros(2),
        beta=0.5,
        nll_weight=nll_weight,
    )
    return micro_batch, torch.tensor([[1.0, 2, 9], [9, 5, 9], [9, 9, 4], [9, 2, 2]])


def test_dpo_micro_batch_by_hand() -> None:
    """Margins 3 + 4 = 7 and -5 + 4 = -1: log(1 + e^-3.5) + log(1 + e^0.5) = 0.029750 + 0.974077."""
    micro_batch, token_nll = two_pairs(nll_weight=0.0)
    total, count, reported = micro_batch.loss(token_nll)
    assert total.item() == pytest.approx(1.003827, abs=1e-6)
    assert count.item() == 2
    assert reported.tolist() == pytest.approx([1.003827, -1.0, -4.0, 1, -8, -8, 3, 2], abs=1e-6)


def test_rpo_adds_the_nll_of_chosen_tokens() -> None:
    """alpha 0.3, 2 pairs, 3 chosen tokens: the mean over pairs of the added term is 0.3 * 8 / 3."""
    micro_batch, token_nll = two_pairs(nll_weight=0.3 * 2 / 3)
    total, count, _ = micro_batch.loss(token_nll)
    assert (total / count).item() == pytest.approx(1.003827 / 2 + 0.3 * 8 / 3, abs=1e-6)


def test_dpo_metrics_by_hand() -> None:
    sums = torch.tensor([1.003827, -1.0, -4.0, 1, -8, -8, 3, 2], dtype=torch.float64)
    metrics = dpo_objective(rpo_alpha=0.3).metrics(sums)
    assert metrics == {
        "loss": pytest.approx(1.003827 / 2 + 0.8),
        "rewards/chosen": -0.5,
        "rewards/rejected": -2.0,
        "rewards/accuracies": 0.5,
        "rewards/margins": 1.5,
        "logps/chosen": -4.0,
        "logps/rejected": -4.0,
        "nll_loss": pytest.approx(8 / 3),
    }
    assert "nll_loss" not in dpo_objective().metrics(sums)


def test_prepare_weighs_the_nll_by_global_counts() -> None:
    """2 pairs, 3 chosen tokens each, alpha 0.3: 0.3 * 2 / 6."""
    step = dpo_objective(rpo_alpha=0.3).prepare([1, 0])
    first = step.micro_batches[0]
    assert isinstance(first, DpoMicroBatch)
    assert first.nll_weight == pytest.approx(0.1)
    assert (first.ref_chosen.item(), first.ref_rejected.item()) == (-4.0, -1.0)
    assert step.num_tokens == 12
    assert [micro_batch.batch.tokens.shape for micro_batch in step.micro_batches] == [(2, 8), (2, 8)]


def test_first_step_must_be_ln_2() -> None:
    good = {"loss": math.log(2) + 5e-5, "rewards/margins": 0.0}
    wrong = {"loss": math.log(2) + 2e-4, "rewards/margins": 0.0}
    dpo_objective().check_first_step(good)
    with pytest.raises(ValueError, match="ln 2"):
        dpo_objective().check_first_step(wrong)
    with pytest.raises(ValueError, match="ln 2"):
        dpo_objective().check_first_step(good | {"rewards/margins": 1e-3})
    dpo_objective(dropout=0.1).check_first_step(wrong)  # with dropout it starts a little off
    dpo_objective(bf16=True).check_first_step(wrong)
    dpo_objective(rpo_alpha=0.3).check_first_step({"loss": math.log(2) + 0.6, "nll_loss": 2.0, "rewards/margins": 0.0})


def test_reference_must_be_of_these_pairs() -> None:
    pairs = [pair("a"), pair("b")]
    records = [ReferenceLogprobs("a", -1.0, -2.0), ReferenceLogprobs("b", -1.0, -2.0)]
    check_reference_ids(pairs, records)
    with pytest.raises(ValueError, match="pair a meets the reference of b"):
        check_reference_ids(pairs, records[::-1])
    with pytest.raises(ValueError, match="2 pairs but 1 reference"):
        check_reference_ids(pairs, records[:1])
