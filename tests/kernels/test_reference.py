"""The definition: hand-worked numbers, TRL's own loss function, gradients by finite differences, what is refused."""

import math
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from srlm_mega.kernels import ops, reference
from srlm_mega.kernels.ops import DpoSettings
from srlm_mega.kernels.reference import DpoLoss, LossType

LOSSES: list[tuple[LossType, float]] = [
    ("sigmoid", 0.0),
    ("sigmoid", 0.1),
    ("robust", 0.1),
    ("hinge", 0.0),
    ("ipo", 0.0),
]
BOUNDS = torch.tensor([0, 2, 3, 7, 9, 12], dtype=torch.int32)
PAIRS = torch.tensor([[0, 1], [4, 2]])


def packed(logp: Tensor, loss_type: LossType = "sigmoid", smoothing: float = 0.0, **options: Any) -> DpoLoss:
    """Two pairs of five sequences of 2, 1, 4, 2, 3 tokens; sequence 3 is in no pair. Of a global batch of 4 pairs with
    10 chosen tokens."""
    consistency = options.pop("consistency", None)
    settings = DpoSettings(
        loss_type=loss_type, label_smoothing=smoothing, **{"beta": 0.5, "chosen_tokens_per_pair": 10 / 4} | options
    )
    ref = torch.tensor([-2.0, -1.0, -5.0, -3.0, -4.0], dtype=logp.dtype)
    return ops.dpo_loss(logp, BOUNDS, PAIRS, ref, settings, consistency)


def log_probs(seed: int = 0) -> Tensor:
    return -torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def test_dpo_loss_worked_out_by_hand() -> None:
    """Sequence sums -1-1, -3, -1.5 * 4, -1-1, -0.5 * 3 = -2, -3, -6, -2, -1.5; references -2, -1, -5, -3, -4.

    Log ratios 0, -2, -1, 1, 2.5. Pair (0, 1): margin 2; pair (4, 2): margin 3.5. With beta 0.5 the losses are
    log(1 + e^-1) = 0.31326169 and log(1 + e^-1.75) = 0.16022415, together 0.47348584, over 4 pairs of the global
    batch 0.11837146. The chosen tokens' log p sum to -3.5; with rpo_alpha 0.2 and 10 tokens: + 0.2 * 0.35 = 0.07.
    d/dlogp of a chosen token of pair 1: -beta * sigmoid(-1) / 4 - 0.2 / 10 = -0.5 * 0.26894142 / 4 - 0.02
    = -0.05361768; of a rejected token of pair 2: beta * sigmoid(-1.75) / 4 = 0.5 * 0.14804720 / 4 = 0.01850590.
    """
    logp = torch.tensor([-1.0, -1, -3, -1.5, -1.5, -1.5, -1.5, -1, -1, -0.5, -0.5, -0.5], dtype=torch.float64)
    logp.requires_grad_()
    out = packed(logp, rpo_alpha=0.2)
    assert out.seq_logp.tolist() == [-2, -3, -6, -2, -1.5]
    assert out.per_pair.tolist() == pytest.approx([0.31326169, 0.16022415], abs=1e-8)
    assert out.loss.item() / 4 == pytest.approx(0.11837146 + 0.07, abs=1e-8)
    # loss, chosen rewards 0 + 1.25, rejected rewards -1 - 0.5, margins above 0, chosen, rejected log p, tokens, pairs
    assert out.sums.tolist() == pytest.approx([0.47348584, 1.25, -1.5, 2, -3.5, -9, 5, 2], abs=1e-8)
    (grad,) = torch.autograd.grad(out.loss / 4, logp)
    assert grad[:2].tolist() == pytest.approx([-0.05361768] * 2, abs=1e-8)
    assert grad[3:7].tolist() == pytest.approx([0.01850590] * 4, abs=1e-8)
    assert grad[7:9].tolist() == [0, 0]


def test_consistency_worked_out_by_hand() -> None:
    """Margins 2 and 3.5 again, beta 0.5: x = 1 and 1.75, and loss(-x) = loss(x) + x. With C 0.75 and 0.25:
    0.31326169 + 0.25 * 1 = 0.56326169 and 0.16022415 + 0.75 * 1.75 = 1.47272415. The gradient of a chosen token:
    -beta * (C * sigmoid(-x) - (1 - C) * sigmoid(x)) / 4; pair 1: 0.75 * 0.26894142 - 0.25 * 0.73105858 = 0.01894142,
    so -0.00236768; of a chosen one of pair 2: 0.25 * 0.14804720 - 0.75 * 0.85195280 = -0.60195280, so 0.07524410."""
    logp = torch.tensor([-1.0, -1, -3, -1.5, -1.5, -1.5, -1.5, -1, -1, -0.5, -0.5, -0.5], dtype=torch.float64)
    logp.requires_grad_()
    out = packed(logp, consistency=torch.tensor([0.75, 0.25]))
    assert out.per_pair.tolist() == pytest.approx([0.56326169, 1.47272415], abs=1e-8)
    (grad,) = torch.autograd.grad(out.loss / 4, logp)
    assert grad[:2].tolist() == pytest.approx([-0.00236768] * 2, abs=1e-8)
    assert grad[9:].tolist() == pytest.approx([0.07524410] * 3, abs=1e-8)
    swapped = packed(logp, consistency=torch.tensor([0.25, 0.75]))
    assert swapped.per_pair.tolist() == pytest.approx([1.06326169, 0.59772415], abs=1e-8), "the pairs' own, in order"
    sure = packed(logp, consistency=torch.tensor([1.0, 1.0]))
    assert torch.equal(sure.per_pair, packed(logp).per_pair)


def test_other_losses_worked_out_by_hand() -> None:
    """Margins 2 and 3.5 again, beta 0.5. Hinge: max(0, 1 - 1) = 0, max(0, 1 - 1.75) = 0; with beta 0.25 0.5 and 0.125.

    IPO, means per token: 0/2 - -2/1 = 2 and 2.5/3 - -1/4 = 1.08333333; minus 1 / (2 * 0.5) = 1, squared: 1, 0.00694444.
    Conservative, 0.1 flipped: 0.9 * 0.31326169 + 0.1 * 1.31326169 = 0.41326169 (log(1 + e) = 1.31326169).
    Robust: (0.9 * 0.31326169 - 0.1 * 1.31326169) / 0.8 = 0.18826169.
    """
    logp = torch.tensor([-1.0, -1, -3, -1.5, -1.5, -1.5, -1.5, -1, -1, -0.5, -0.5, -0.5], dtype=torch.float64)
    assert packed(logp, "hinge").per_pair.tolist() == [0, 0]
    assert packed(logp, "hinge", beta=0.25).per_pair.tolist() == pytest.approx([0.5, 0.125])
    assert packed(logp, "ipo").per_pair.tolist() == pytest.approx([1, 0.00694444], abs=1e-8)
    assert packed(logp, "sigmoid", 0.1).per_pair[0].item() == pytest.approx(0.41326169, abs=1e-8)
    assert packed(logp, "robust", 0.1).per_pair[0].item() == pytest.approx(0.18826169, abs=1e-8)


@pytest.mark.parametrize(("loss_type", "smoothing"), LOSSES)
def test_loss_and_metrics_are_trl_s(loss_type: LossType, smoothing: float) -> None:
    """TRL 1.16's own DPOTrainer._compute_loss on the same log p, in fp64.

    TRL has no label smoothing for `sigmoid`; conservative DPO is its `aot` of a single pair, where sorting is nothing.
    """
    trl_type = "aot" if loss_type == "sigmoid" and smoothing else loss_type
    logp = log_probs()
    ours = one_pair(logp[:7], loss_type, smoothing)
    loss, metrics = trl_loss(logp[:7], trl_type, smoothing)
    sums = ours.sums.tolist()
    assert ours.loss.item() == pytest.approx(loss, rel=1e-12)
    for place, name in [(1, "rewards/chosen"), (2, "rewards/rejected"), (3, "rewards/accuracies"), (4, "logps/chosen")]:
        assert sums[place] == pytest.approx(metrics[name], rel=1e-12), name
    assert sums[5] == pytest.approx(metrics["logps/rejected"], rel=1e-12)
    assert abs(loss - trl_loss(logp[:7].flip(0), trl_type, smoothing)[0]) > 1e-3, "other log p, another loss"


def one_pair(logp: Tensor, loss_type: LossType, smoothing: float) -> DpoLoss:
    """Four chosen tokens, then three rejected ones."""
    ref = torch.tensor([-3.0, -5.0], dtype=torch.float64)
    bounds, pairs = torch.tensor([0, 4, 7]), torch.tensor([[0, 1]])
    return ops.dpo_loss(logp, bounds, pairs, ref, DpoSettings(0.3, loss_type, smoothing))


def trl_loss(logp: Tensor, loss_type: str, smoothing: float) -> tuple[float, dict[str, float]]:
    """TRL's loss and metrics of `one_pair`, with a prompt of two tokens and padding behind the rejected completion."""
    from trl import DPOTrainer  # seconds to import, and only this test needs it

    per_token = torch.zeros(2, 5, dtype=torch.float64)
    per_token[0, 1:5], per_token[1, 1:4] = logp[:4], logp[4:]
    completion_mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]])
    outputs = SimpleNamespace(
        log_probs=per_token, entropy=per_token, mean_logits=per_token, is_top1=per_token > -1, aux_loss=None
    )
    metrics: dict[str, list[float]] = {}
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen")
    for name in (*names, "logps/rejected", "entropy", "num_tokens", "logits/chosen", "logits/rejected"):
        metrics[name] = []
    metrics["mean_token_accuracy"] = []
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=0.3,
        label_smoothing=smoothing,
        use_weighting=False,
        _metrics={"eval": metrics},
        _total_train_tokens=0,
    )
    inputs = {
        "input_ids": torch.zeros(2, 6, dtype=torch.long),
        "completion_mask": completion_mask,
        "ref_chosen_logps": torch.tensor([-3.0], dtype=torch.float64),
        "ref_rejected_logps": torch.tensor([-5.0], dtype=torch.float64),
    }
    # The completion's log p are zero outside its mask here, as in TRL's models, whose labels are -100 there.
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return float(loss), {name: values[-1] for name, values in metrics.items() if values}


@pytest.mark.parametrize(("loss_type", "smoothing"), LOSSES)
def test_dpo_gradient_by_finite_differences(loss_type: LossType, smoothing: float) -> None:
    logp = log_probs(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: packed(x, loss_type, smoothing, rpo_alpha=0.3).loss, (logp,))


@pytest.mark.parametrize("with_rows", [False, True])
def test_log_prob_gradients_by_finite_differences(with_rows: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([4, 0, 2]) if with_rows else None
    target = torch.tensor([6, -100, 0, 3, 3])[: 3 if with_rows else 5]

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return ops.vp_linear_logprob(hidden, weight, target, rows, vocab_start=0, tp_group=None)

    assert torch.autograd.gradcheck(head, (hidden, weight))
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([6, -100, 0, 3, 3])
    assert torch.autograd.gradcheck(lambda z: ops.vp_logprob_(z, target, vocab_start=0, tp_group=None), (logits,))


def test_log_probs_are_log_softmax_of_fp32_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, generator=generator).bfloat16()
    weight = torch.randn(50, 8, generator=generator).bfloat16()
    target = torch.tensor([0, 49, -100])
    rows = torch.tensor([5, 1, 2])
    logp = ops.vp_linear_logprob(hidden, weight, target, rows, vocab_start=0, tp_group=None)
    true = torch.log_softmax(hidden.double() @ weight.double().T, -1)
    assert logp.dtype == torch.float32 and logp[2] == 0
    expected = [true[5, 0].item(), true[1, 49].item()]
    # A logit adds 8 products below 8 (each rounds by up to 2 eps), log p subtracts twice below 16 (4 eps each).
    assert logp[:2].tolist() == pytest.approx(expected, abs=(8 * 2 + 2 * 4) * torch.finfo(torch.float32).eps)
    rounded = torch.log_softmax((hidden @ weight.T).float(), -1)
    assert abs(rounded[5, 0].item() - expected[0]) > 1e-4, "the bound above sees logits that were rounded to bf16"


def test_nothing_to_compute_still_has_gradients() -> None:
    """A rank without response tokens or pairs takes part: empty results, zero loss, zero gradients."""
    hidden, weight = torch.ones(3, 2, requires_grad=True), torch.ones(5, 2, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    logp = ops.vp_linear_logprob(hidden, weight, none, none, vocab_start=0, tp_group=None)
    assert logp.shape == (0,)
    for loss_type, smoothing in LOSSES:
        settings = DpoSettings(0.1, loss_type, smoothing)
        out = ops.dpo_loss(logp, torch.tensor([0]), none.view(0, 2), torch.zeros(0), settings)
        grads = torch.autograd.grad(out.loss, [hidden, weight], retain_graph=True)
        assert out.loss == 0 and out.sums.tolist() == [0] * 8 and not any(grad.any() for grad in grads)


HEAD: dict[str, Any] = {
    "hidden": torch.ones(4, 3),
    "weight": torch.ones(6, 3),
    "target": torch.tensor([0, 5]),
    "rows": torch.tensor([3, 0]),
    "vocab_start": 0,
    "tp_group": None,
}
DPO: dict[str, Any] = {
    "logp": torch.zeros(6),
    "cu_seqlens": torch.tensor([0, 2, 4, 6]),
    "pairs": torch.tensor([[0, 1]]),
    "ref_logp": torch.zeros(3),
}


def with_changes(changed: dict[str, Any]) -> None:
    """The loss with some of the tensors or settings changed."""
    settings = DpoSettings(**{"beta": 0.1} | {name: value for name, value in changed.items() if name in SETTINGS})
    tensors = DPO | {name: value for name, value in changed.items() if name not in SETTINGS}
    ops.dpo_loss(**tensors, settings=settings)


SETTINGS = {field.name for field in fields(DpoSettings)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.ones(4, 3, dtype=torch.int32)}, "hidden: got torch.int32"),
        ({"hidden": torch.ones(4, 3, device="meta")}, "weight: got a tensor on cpu, expected one on meta"),
        ({"weight": torch.ones(6, 3).bfloat16()}, "weight: got torch.bfloat16"),
        ({"weight": torch.ones(6, 4)}, r"weight: got shape \[6, 4\], expected \[any, 3\]"),
        ({"weight": torch.ones(3, 6).T}, "weight: got strides"),
        ({"target": torch.tensor([0, 6])}, r"target: got token \[6\], expected 0 to 5"),
        ({"target": torch.tensor([-1, 0])}, r"target: got token \[-1\]"),
        ({"target": torch.tensor([0.0, 1.0])}, "target: got torch.float32"),
        ({"rows": torch.tensor([4, 0])}, r"rows: got row \[4\], expected 0 to 3"),
        ({"rows": torch.tensor([1, 1])}, "rows: got a row twice"),
        ({"rows": torch.tensor([1])}, r"rows: got shape \[1\], expected \[2\]"),
        ({"rows": None}, r"target: got shape \[2\], expected \[4\]"),
        ({"vocab_start": 6}, "vocab_start: got 6, expected 0 on rank 0"),
        ({"chunk_rows": 0}, "chunk_rows: got 0"),
        ({"save": "all"}, "save: got all"),
    ],
)
def test_head_refuses(changed: dict[str, Any], message: str) -> None:
    ops.vp_linear_logprob(**HEAD)
    with pytest.raises(ValueError, match=message):
        ops.vp_linear_logprob(**HEAD | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logp": torch.zeros(6).half()}, "logp: got torch.float16"),
        ({"logp": torch.zeros(5)}, r"cu_seqlens: got \[0, 2, 4, 6\], expected rising bounds from 0 to the 5"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, "cu_seqlens: got"),
        ({"cu_seqlens": torch.tensor([0, 6])}, r"cu_seqlens: got shape \[2\], expected \[4\]"),
        ({"pairs": torch.tensor([[0, 1], [1, 2]])}, "pairs: got a sequence twice"),
        ({"pairs": torch.tensor([[0, 3]])}, r"pairs: got sequence \[3\], expected 0 to 2"),
        ({"pairs": torch.tensor([0, 1])}, r"pairs: got shape \[2\]"),
        ({"ref_logp": torch.zeros(3, dtype=torch.int64)}, "ref_logp: got torch.int64"),
        ({"beta": 0.0}, "beta: got 0.0"),
        ({"loss_type": "kto"}, "loss_type: got kto, expected sigmoid, robust, hinge or ipo"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing: got 0.5"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing: got 0.1"),
        ({"consistency": torch.ones(2)}, r"consistency: got shape \[2\], expected \[1\]"),
        ({"consistency": torch.tensor([1.5])}, r"consistency: got \[1.5\], expected shares from 0 to 1"),
        ({"consistency": torch.ones(1), "loss_type": "ipo"}, "loss_type: got ipo, expected sigmoid"),
        ({"consistency": torch.ones(1), "label_smoothing": 0.1}, "label_smoothing: got 0.1"),
        ({"rpo_alpha": -1.0}, "rpo_alpha: got -1.0"),
        ({"rpo_alpha": 1.0}, "chosen_tokens_per_pair: got 0.0"),
    ],
)
def test_dpo_loss_refuses(changed: dict[str, Any], message: str) -> None:
    with_changes({})
    with pytest.raises(ValueError, match=message):
        with_changes(changed)


def test_logits_are_refused_like_hidden_states() -> None:
    logits, target = torch.ones(2, 6), torch.tensor([0, 5])
    with pytest.raises(ValueError, match="logits: got strides"):
        ops.vp_logprob_(torch.ones(6, 2).T, target, vocab_start=0, tp_group=None)
    with pytest.raises(ValueError, match=r"target: got shape \[1\]"):
        ops.vp_logprob_(logits, target[:1], vocab_start=0, tp_group=None)
    with pytest.raises(ValueError, match=r"target: got token \[6\]"):
        ops.vp_logprob_(logits, target + 1, vocab_start=0, tp_group=None)


def test_the_first_loss_of_a_round_is_ln_2() -> None:
    """Policy and reference are one model: every margin is 0."""
    logp = log_probs()
    ref = reference.segment_sums(logp, BOUNDS)
    out = ops.dpo_loss(logp, BOUNDS, PAIRS, ref, DpoSettings(0.1))
    assert out.loss.item() / 2 == pytest.approx(math.log(2), abs=1e-12) and out.sums[3] == 0
