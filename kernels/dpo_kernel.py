"""Triton: the DPO loss, its metrics and its gradient in one launch, one program per sequence.

Sums run in a fixed order, so that two launches give the same bits. It has not run on a GPU yet.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from srlm_mega.kernels.reference import DpoLoss, DpoSettings

BLOCK, NUM_WARPS = 1024, 4  # response tokens per iteration


def dpo_loss(
    logp: Tensor,
    cu_seqlens: Tensor,
    pairs: Tensor,
    ref_logp: Tensor,
    settings: DpoSettings,
    consistency: Tensor | None = None,
) -> DpoLoss:
    """Compute what `ops.dpo_loss` documents, for P > 0 and logp in fp32, by one launch after clearing four bytes."""
    return DpoLoss(*_DpoLoss.apply(logp, cu_seqlens, pairs, ref_logp, settings, consistency))


class _DpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logp: Tensor,
        cu_seqlens: Tensor,
        pairs: Tensor,
        ref_logp: Tensor,
        settings: DpoSettings,
        consistency: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return loss [], sums [8], seq_logp [S], per_pair [P]; the same launch computes the gradient [N]."""
        grad = torch.empty_like(logp)
        seq_logp = torch.empty_like(ref_logp, dtype=torch.float32)
        per_pair = logp.new_empty(len(pairs))
        loss, sums = logp.new_empty(()), logp.new_empty(8, dtype=torch.float64)
        dpo_kernel[(len(ref_logp),)](
            logp.contiguous(),
            cu_seqlens.contiguous(),
            pairs.contiguous(),
            ref_logp.float().contiguous(),
            grad,
            seq_logp,
            per_pair,
            logp.new_empty(len(pairs), 8),
            loss,
            sums,
            torch.zeros(1, dtype=torch.int32, device=logp.device),
            ref_logp if consistency is None else consistency.contiguous(),  # not read with PER_PAIR=False
            len(pairs),
            settings.beta,
            settings.label_smoothing,
            settings.nll_weight,
            LOSS_TYPE=settings.loss_type,
            PER_PAIR=consistency is not None,
            BLOCK=BLOCK,
            PAIR_BLOCK=triton.next_power_of_2(len(pairs)),
            num_warps=NUM_WARPS,
        )
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(sums, seq_logp, per_pair)
        return loss, sums, seq_logp, per_pair

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None, None, None, None


@triton.jit  # type: ignore[untyped-decorator]
def segment_sum(logp: tl.tensor, start: tl.tensor, stop: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Return the sum of logp[start:stop]."""
    offsets = tl.arange(0, BLOCK)
    totals = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, stop, BLOCK):
        totals += tl.load(logp + first + offsets, mask=first + offsets < stop, other=0.0)
    return tl.sum(totals, 0)


@triton.jit  # type: ignore[untyped-decorator]
def softplus(x: tl.tensor) -> tl.tensor:
    """Return log(1 + exp(x)) = -log sigmoid(-x)."""
    return tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit  # type: ignore[untyped-decorator]
def pair_loss(
    chosen_ratio: tl.tensor,
    rejected_ratio: tl.tensor,
    chosen_length: tl.tensor,
    rejected_length: tl.tensor,
    beta: tl.tensor,
    label_smoothing: tl.tensor,
    LOSS_TYPE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return a pair's loss as reference.py defines it, and its derivatives by the two log ratios."""
    x = beta * (chosen_ratio - rejected_ratio)
    if LOSS_TYPE == "ipo":
        distance = chosen_ratio / chosen_length - rejected_ratio / rejected_length - 1 / (2 * beta)
        value = distance * distance
        by_chosen = 2 * distance / chosen_length
        by_rejected = -2 * distance / rejected_length
    else:
        if LOSS_TYPE == "sigmoid":
            value = (1 - label_smoothing) * softplus(-x) + label_smoothing * softplus(x)
            slope = label_smoothing * tl.sigmoid(x) - (1 - label_smoothing) * tl.sigmoid(-x)
        elif LOSS_TYPE == "robust":
            unbiased = 1 / (1 - 2 * label_smoothing)
            value = unbiased * ((1 - label_smoothing) * softplus(-x) - label_smoothing * softplus(x))
            slope = -unbiased * ((1 - label_smoothing) * tl.sigmoid(-x) + label_smoothing * tl.sigmoid(x))
        else:
            tl.static_assert(LOSS_TYPE == "hinge", "unknown LOSS_TYPE")
            value = tl.maximum(1 - x, 0.0)
            slope = tl.where(x < 1, -1.0, 0.0)
        by_chosen = beta * slope
        by_rejected = -beta * slope
    return value, by_chosen, by_rejected


@triton.jit  # type: ignore[untyped-decorator]
def add_up_pairs(
    pair_sums: tl.tensor,
    sums: tl.tensor,
    loss: tl.tensor,
    num_pairs: tl.tensor,
    nll_weight: tl.tensor,
    PAIR_BLOCK: tl.constexpr,
) -> None:
    """Store the sums over pairs, in fp64 and in a fixed order, and the loss.

    `.cg` reads past the L1 cache, which does not see what other programs wrote.
    """
    places = tl.arange(0, PAIR_BLOCK)
    value_sum = 0.0
    chosen_sum = 0.0
    for index in tl.static_range(8):
        own = tl.load(pair_sums + 8 * places + index, mask=places < num_pairs, other=0.0, cache_modifier=".cg")
        total = tl.sum(own.to(tl.float64), 0)
        tl.store(sums + index, total)
        if index == 0:
            value_sum = total
        if index == 4:
            chosen_sum = total
    tl.store(loss, (value_sum - chosen_sum * nll_weight).to(tl.float32))


@triton.jit  # type: ignore[untyped-decorator]
def dpo_kernel(
    logp: tl.tensor,
    cu_seqlens: tl.tensor,
    pairs: tl.tensor,
    ref_logp: tl.tensor,
    grad: tl.tensor,
    seq_logp: tl.tensor,
    per_pair: tl.tensor,
    pair_sums: tl.tensor,
    loss: tl.tensor,
    sums: tl.tensor,
    arrived: tl.tensor,
    consistency: tl.tensor,
    num_pairs: tl.tensor,
    beta: tl.tensor,
    label_smoothing: tl.tensor,
    nll_weight: tl.tensor,
    LOSS_TYPE: tl.constexpr,
    PER_PAIR: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
) -> None:
    """Compute, as program s, the gradient of sequence s, and its pair's loss and metrics if s is the chosen one.

    Both programs of a pair sum both sequences, so that neither waits for the other. The program that arrives last adds
    up the pairs.
    """
    s = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    places = tl.arange(0, PAIR_BLOCK)
    is_pair = places < num_pairs
    chosen_ids = tl.load(pairs + 2 * places, mask=is_pair, other=-1).to(tl.int32)
    rejected_ids = tl.load(pairs + 2 * places + 1, mask=is_pair, other=-1).to(tl.int32)
    # At most one pair has s: the sum over the places that match is that pair, or 0 where there is none.
    matches = (chosen_ids == s) | (rejected_ids == s)
    paired = tl.sum(matches.to(tl.int32), 0) > 0
    is_chosen = tl.sum((chosen_ids == s).to(tl.int32), 0) > 0
    pair = tl.sum(tl.where(matches, places, 0), 0)
    chosen = tl.where(paired, tl.sum(tl.where(matches, chosen_ids, 0), 0), s)
    rejected = tl.where(paired, tl.sum(tl.where(matches, rejected_ids, 0), 0), s)

    chosen_start, chosen_stop = tl.load(cu_seqlens + chosen), tl.load(cu_seqlens + chosen + 1)
    rejected_start, rejected_stop = tl.load(cu_seqlens + rejected), tl.load(cu_seqlens + rejected + 1)
    chosen_logp = segment_sum(logp, chosen_start, chosen_stop, BLOCK)
    rejected_logp = segment_sum(logp, rejected_start, rejected_stop, BLOCK)
    chosen_ratio = chosen_logp - tl.load(ref_logp + chosen)
    rejected_ratio = rejected_logp - tl.load(ref_logp + rejected)
    chosen_length = tl.maximum(chosen_stop - chosen_start, 1).to(tl.float32)
    rejected_length = tl.maximum(rejected_stop - rejected_start, 1).to(tl.float32)

    if PER_PAIR:  # 1 - consistency is the share of a pair that counts the wrong way round
        label_smoothing = 1 - tl.load(consistency + pair)
    value, by_chosen, by_rejected = pair_loss(
        chosen_ratio, rejected_ratio, chosen_length, rejected_length, beta, label_smoothing, LOSS_TYPE
    )
    derivative = tl.where(is_chosen, by_chosen - nll_weight, by_rejected)
    derivative = tl.where(paired, derivative, 0.0)
    start = tl.where(is_chosen, chosen_start, rejected_start)
    stop = tl.where(is_chosen, chosen_stop, rejected_stop)
    for first in range(start, stop, BLOCK):
        inside = first + offsets < stop
        tl.store(grad + first + offsets, tl.zeros((BLOCK,), tl.float32) + derivative, mask=inside)
    tl.store(seq_logp + s, tl.where(is_chosen, chosen_logp, rejected_logp))
    tl.store(per_pair + pair, value, mask=is_chosen)
    own = pair_sums + 8 * pair
    tl.store(own, value, mask=is_chosen)
    tl.store(own + 1, beta * chosen_ratio, mask=is_chosen)
    tl.store(own + 2, beta * rejected_ratio, mask=is_chosen)
    tl.store(own + 3, (chosen_ratio - rejected_ratio > 0).to(tl.float32), mask=is_chosen)
    tl.store(own + 4, chosen_logp, mask=is_chosen)
    tl.store(own + 5, rejected_logp, mask=is_chosen)
    tl.store(own + 6, (chosen_stop - chosen_start).to(tl.float32), mask=is_chosen)
    tl.store(own + 7, 1.0, mask=is_chosen)

    tl.debug_barrier()  # all threads' stores come before this program's arrival
    if tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        add_up_pairs(pair_sums, sums, loss, num_pairs, nll_weight, PAIR_BLOCK)
