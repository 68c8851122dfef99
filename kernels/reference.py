"""The mathematics of the DPO head in plain PyTorch: the definition that anything faster is measured against.

Small pure functions of tensors, differentiated by autograd. `kernels/ops.py` is what training calls.
"""

from dataclasses import dataclass
from typing import Literal, assert_never, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from srlm_mega.kernels.checks import IGNORE_INDEX, require
from srlm_mega.kernels.collectives import copy_to_ranks, gather_sequence, max_over_ranks, sum_over_ranks

LossType = Literal["sigmoid", "robust", "hinge", "ipo"]


@dataclass(frozen=True)
class DpoSettings:
    """Settings of a DPO loss, the same for all pairs of a global batch. ValueError names what does not fit.

    beta: factor of the log ratios, above 0.
    loss_type: the loss of one pair; sigmoid is DPO's own. `ops.dpo_loss` has the formulas.
    label_smoothing: share of the pairs assumed to be the wrong way round, from 0; with sigmoid (conservative DPO) below
    1, with robust below 0.5, with hinge and ipo 0.
    rpo_alpha: weight of the mean -log p of a chosen token, from 0.
    chosen_tokens_per_pair: the mean over the global batch, above 0; read only where rpo_alpha is above 0.
    """

    beta: float
    loss_type: LossType = "sigmoid"
    label_smoothing: float = 0.0
    rpo_alpha: float = 0.0
    chosen_tokens_per_pair: float = 0.0

    def __post_init__(self) -> None:
        known = get_args(LossType)
        require(self.beta > 0, "beta", self.beta, "a positive number")
        require(self.loss_type in known, "loss_type", self.loss_type, f"{', '.join(known[:-1])} or {known[-1]}")
        limit = {"sigmoid": 1.0, "robust": 0.5}.get(self.loss_type, 0.0)
        fits = self.label_smoothing == 0 or 0 <= self.label_smoothing < limit
        expected = f"0, or up to (not including) {limit} with {self.loss_type}"
        require(fits, "label_smoothing", self.label_smoothing, expected)
        require(self.rpo_alpha >= 0, "rpo_alpha", self.rpo_alpha, "0 or a positive number")
        counted = self.rpo_alpha == 0 or self.chosen_tokens_per_pair > 0
        require(counted, "chosen_tokens_per_pair", self.chosen_tokens_per_pair, "a positive number with rpo_alpha")

    @property
    def nll_weight(self) -> float:
        """Factor of the chosen tokens' summed -log p in the loss summed over pairs."""
        return self.rpo_alpha / self.chosen_tokens_per_pair if self.rpo_alpha > 0 else 0.0


@dataclass(frozen=True)
class DpoLoss:
    """The result of `dpo_loss`. Only `loss` has a gradient.

    sums, over the pairs of this call, to be added up over micro batches and ranks: loss (without the NLL term), chosen
    rewards, rejected rewards, pairs with a margin above 0, chosen log p, rejected log p, chosen tokens, pairs. A reward
    is beta * (log pi(y) - log ref(y)).
    """

    loss: Tensor  # []
    sums: Tensor  # [8] fp64
    seq_logp: Tensor  # [S], summed log p of each sequence
    per_pair: Tensor  # [P], each pair's loss without the NLL term


def vp_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    *,
    vocab_start: int,
    tp_group: ProcessGroup | None,
    sequence_parallel: bool,
) -> Tensor:
    """Return log p [N] of the targets from the last hidden states, as `ops.vp_linear_logprob` documents it."""
    hidden = (gather_sequence if sequence_parallel else copy_to_ranks)(hidden, tp_group)
    selected = hidden if rows is None else hidden[rows]
    logits = wide(selected) @ wide(weight).T
    return vp_logprob(logits, target, vocab_start=vocab_start, tp_group=tp_group)


def vp_logprob(logits: Tensor, target: Tensor, *, vocab_start: int, tp_group: ProcessGroup | None) -> Tensor:
    """Return log softmax of logits [T, V/tp] over all ranks at target, [T]: (z_y - max) - log sum exp(z - max)."""
    logits = wide(logits)
    peak = max_over_ranks(logits.amax(1), tp_group)
    total = sum_over_ranks((logits - peak[:, None]).exp().sum(1), tp_group)
    column = target - vocab_start
    owned = (column >= 0) & (column < logits.shape[1])
    at_target = logits.gather(1, column.where(owned, 0)[:, None]).squeeze(1)
    shifted = sum_over_ranks((at_target - peak).where(owned, 0), tp_group)
    return (shifted - total.log()).where(target != IGNORE_INDEX, 0)


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32, or unchanged where it is fp64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def dpo_loss(
    logp: Tensor,
    cu_seqlens: Tensor,
    pairs: Tensor,
    ref_logp: Tensor,
    settings: DpoSettings,
    consistency: Tensor | None = None,
) -> DpoLoss:
    """Return the loss of pairs of packed sequences, as `ops.dpo_loss` documents it."""
    beta, loss_type = settings.beta, settings.loss_type
    lengths = cu_seqlens.diff()
    seq_logp = segment_sums(logp, cu_seqlens)
    ratios = seq_logp - ref_logp.to(seq_logp.dtype)
    chosen, rejected = pairs.long().unbind(1)
    margins = ratios[chosen] - ratios[rejected]
    match loss_type:
        case "sigmoid":
            smoothing = settings.label_smoothing if consistency is None else 1 - consistency.to(margins.dtype)
            per_pair = sigmoid_loss(margins, beta, smoothing)
        case "robust":
            per_pair = robust_loss(margins, beta, settings.label_smoothing)
        case "hinge":
            per_pair = hinge_loss(margins, beta)
        case "ipo":
            mean_ratios = ratios / lengths.clamp(min=1)
            per_pair = ipo_loss(mean_ratios[chosen] - mean_ratios[rejected], beta)
        case _:
            assert_never(loss_type)
    loss = per_pair.sum()
    if settings.rpo_alpha > 0:
        loss = loss - settings.rpo_alpha * seq_logp[chosen].sum() / settings.chosen_tokens_per_pair
    with torch.no_grad():
        sums = torch.stack(
            [
                per_pair.double().sum(),
                beta * ratios[chosen].double().sum(),
                beta * ratios[rejected].double().sum(),
                (margins > 0).double().sum(),
                seq_logp[chosen].double().sum(),
                seq_logp[rejected].double().sum(),
                lengths[chosen].double().sum(),
                torch.full_like(margins, 1.0, dtype=torch.float64).sum(),
            ]
        )
    return DpoLoss(loss, sums, seq_logp.detach(), per_pair.detach())


def segment_sums(logp: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the sums of logp [N] between the bounds [S+1]: [S]. Sums, never means."""
    return torch.segment_reduce(logp, "sum", offsets=cu_seqlens)


def sigmoid_loss(margins: Tensor, beta: float, label_smoothing: float | Tensor) -> Tensor:
    """Return DPO's loss (Rafailov et al. 2023, arXiv 2305.18290, equation 7): -log sigmoid(beta * margin), [P] -> [P].

    With label_smoothing e, the share of flipped labels, it is conservative DPO (Mitchell 2023, "A note on DPO with
    noisy preferences", equation 3): (1 - e) * loss(margin) + e * loss(-margin). One e for all, or one per pair [P].
    """
    kept, flipped = -F.logsigmoid(beta * margins), -F.logsigmoid(-beta * margins)
    return (1 - label_smoothing) * kept + label_smoothing * flipped


def robust_loss(margins: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Return robust DPO's loss (Chowdhury et al. 2024, arXiv 2403.00409), unbiased when the share e of the labels is
    flipped: ((1 - e) * loss(margin) - e * loss(-margin)) / (1 - 2e), [P] -> [P]."""
    kept, flipped = -F.logsigmoid(beta * margins), -F.logsigmoid(-beta * margins)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(margins: Tensor, beta: float) -> Tensor:
    """Return SLiC's hinge loss on DPO's margin, as TRL has it: max(0, 1 - beta * margin), [P] -> [P]."""
    return F.relu(1 - beta * margins)


def ipo_loss(mean_margins: Tensor, beta: float) -> Tensor:
    """Return IPO's loss (Azar et al. 2023, arXiv 2310.12036, equation 17): (margin - 1 / (2 beta))^2, [P] -> [P].

    As in TRL 1.16 the margin is that of per-token means: log pi(y)/ref(y), divided by y's number of tokens.
    """
    return (mean_margins - 1 / (2 * beta)).square()
