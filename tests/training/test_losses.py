"""SFT and DPO losses with numbers worked out by hand. The formulas of single pairs: tests/kernels/test_reference.py."""

import math

import pytest
import torch
from torch import Tensor

from srlm_mega.config.training import DpoConfig, OptimizationConfig, ParallelConfig, TrainerConfig
from srlm_mega.kernels.ops import DpoSettings
from srlm_mega.records import ReferenceLogprobs
from srlm_mega.training.batch import PairSequences, TokenSequence, padded_batch
from srlm_mega.training.dpo import (
    DpoMicroBatch,
    DpoObjective,
    check_reference_ids,
    first_step_tolerance,
    loss_without_margin,
)
from srlm_mega.training.sft import SftMicroBatch, SftObjective
from srlm_mega.training.topology import Topology

TOPOLOGY = Topology(0, 1, torch.device("cpu"), 0, 1, 0, 1, 0, 1, ParallelConfig())
# Results worked out to six digits are right to half of the last one; fp32 rounds a dozen times by up to eps below 2.
BOUND = 5e-7 + 12 * torch.finfo(torch.float32).eps


def pair(name: str) -> PairSequences:
    return PairSequences(name, TokenSequence("c", (1, 2, 3, 4), 1), TokenSequence("r", (1, 5), 1))


def section(**settings: float | str) -> DpoConfig:
    plain = {"train_iters": 1, "lr": 1e-3, "min_lr": 0, "global_batch_size": 2}
    return DpoConfig.model_validate(plain | {"attention_dropout": 0, "hidden_dropout": 0} | settings)


def dpo_objective(tolerance: float | None = 1e-4, **settings: float | str) -> DpoObjective:
    reference = [ReferenceLogprobs("a", -3.0, -2.0), ReferenceLogprobs("b", -4.0, -1.0)]
    return DpoObjective([pair("a"), pair("b")], reference, section(**settings), TOPOLOGY, 10, tolerance)


def test_sft_counts_targets_only() -> None:
    """1 + 2 + 8 = 11 over 3 tokens."""
    sequences = [TokenSequence("a", (1, 2, 3, 4), 2), TokenSequence("b", (1, 2), 0)]
    micro_batch = SftMicroBatch(padded_batch(sequences, 2, 8))
    total, count, reported = micro_batch.loss(torch.tensor([-1.0, -2, -8]))
    assert (total.item(), count.item(), reported.tolist()) == (11.0, 3, [11.0, 3.0])


def test_sft_mean_is_over_all_tokens_not_over_sequences() -> None:
    """Means per sequence would give (1.5 + 8) / 2 = 4.75."""
    section = OptimizationConfig(train_iters=1, lr=1e-3, min_lr=0)
    metrics = SftObjective([], section, TOPOLOGY, 10).metrics(torch.tensor([11.0, 3.0]))
    assert metrics["loss"] == pytest.approx(11 / 3)


def two_pairs(rpo_alpha: float) -> tuple[DpoMicroBatch, Tensor]:
    """Chosen log p: -(1 + 2) = -3 and -5; rejected -4 and -(2 + 2) = -4; references 0 but for the first chosen, -6."""
    sequences = [TokenSequence(f"s{length}", (1,) * (length + 1), 0) for length in (2, 1, 1, 2)]
    micro_batch = DpoMicroBatch(
        batch=padded_batch(sequences, 4, 8),
        ref_logps=torch.tensor([-6.0, 0.0, 0.0, 0.0]),
        settings=DpoSettings(beta=0.5, rpo_alpha=rpo_alpha, chosen_tokens_per_pair=3 / 2),
    )
    return micro_batch, -torch.tensor([1.0, 2, 4, 5, 2, 2])


def test_dpo_micro_batch_by_hand() -> None:
    """Margins 3 + 4 = 7 and -5 + 4 = -1: log(1 + e^-3.5) + log(1 + e^0.5) = 0.029750 + 0.974077."""
    micro_batch, logps = two_pairs(rpo_alpha=0.0)
    total, count, reported = micro_batch.loss(logps)
    assert total.item() == pytest.approx(1.003827, abs=BOUND)
    assert count.item() == 2
    assert reported.tolist() == pytest.approx([1.003827, -1.0, -4.0, 1, -8, -8, 3, 2], abs=BOUND)


def test_rpo_adds_the_nll_of_chosen_tokens() -> None:
    """alpha 0.3, 2 pairs, 3 chosen tokens: the mean over pairs of the added term is 0.3 * 8 / 3."""
    micro_batch, logps = two_pairs(rpo_alpha=0.3)
    total, count, _ = micro_batch.loss(logps)
    assert (total / count).item() == pytest.approx(1.003827 / 2 + 0.3 * 8 / 3, abs=BOUND)


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


def test_prepare_counts_over_the_global_batch() -> None:
    """2 pairs with 3 chosen tokens each; references travel with their pairs."""
    step = dpo_objective(rpo_alpha=0.3).prepare([1, 0])
    first = step.micro_batches[0]
    assert isinstance(first, DpoMicroBatch)
    assert first.settings.chosen_tokens_per_pair == 3
    assert first.ref_logps.tolist() == [-4.0, -1.0]
    assert step.num_tokens == 12 and step.num_positions == 32
    assert step.padding_fraction == pytest.approx(1 - 8 / 32)
    assert [micro_batch.batch.tokens.shape for micro_batch in step.micro_batches] == [(2, 8), (2, 8)]


def test_prepare_packs_pairs() -> None:
    step = dpo_objective(packed_sequence_size=16).prepare([1, 0])
    assert [micro_batch.batch.tokens.shape for micro_batch in step.micro_batches] == [(1, 8)]
    only = step.micro_batches[0]
    assert isinstance(only, DpoMicroBatch)
    assert sorted(only.ref_logps.tolist()) == [-4.0, -3.0, -2.0, -1.0]
    assert step.padding_fraction == 0


@pytest.mark.parametrize(("loss_type", "due"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 25.0)])
def test_first_step_is_known(loss_type: str, due: float) -> None:
    """IPO: (0 - 1 / (2 * 0.1))^2 = 25."""
    assert loss_without_margin(section(loss_type=loss_type)) == pytest.approx(due)
    good = {"loss": due * (1 + 5e-5), "rewards/margins": 0.0}
    dpo_objective(loss_type=loss_type).check_first_step(good)
    with pytest.raises(ValueError, match="not the starting model's"):
        dpo_objective(loss_type=loss_type).check_first_step(good | {"loss": due * (1 + 2e-4)})


def test_first_step_must_be_ln_2() -> None:
    good = {"loss": math.log(2) + 5e-5, "rewards/margins": 0.0}
    wrong = {"loss": math.log(2) + 2e-4, "rewards/margins": 0.0}
    with pytest.raises(ValueError, match=r"expected 0\.693147 \(margin 0\) within"):
        dpo_objective().check_first_step(good | {"rewards/margins": 1e-3})
    dpo_objective(hidden_dropout=0.1).check_first_step(wrong)  # with dropout it starts a little off
    dpo_objective(tolerance=2e-2).check_first_step(wrong)
    dpo_objective(tolerance=None).check_first_step(wrong)
    dpo_objective(rpo_alpha=0.3).check_first_step({"loss": math.log(2) + 0.6, "nll_loss": 2.0, "rewards/margins": 0.0})


def test_fp8_has_no_first_step_to_check() -> None:
    assert first_step_tolerance(TrainerConfig()) == 1e-4
    assert first_step_tolerance(TrainerConfig(bf16=True)) == 2e-2
    assert first_step_tolerance(TrainerConfig(bf16=True, fp8="hybrid")) is None


def test_reference_must_be_of_these_pairs() -> None:
    pairs = [pair("a"), pair("b")]
    records = [ReferenceLogprobs("a", -1.0, -2.0), ReferenceLogprobs("b", -1.0, -2.0)]
    check_reference_ids(pairs, records)
    with pytest.raises(ValueError, match="pair a has the reference of b"):
        check_reference_ids(pairs, records[::-1])
    with pytest.raises(ValueError, match="2 pairs but 1 reference"):
        check_reference_ids(pairs, records[:1])
