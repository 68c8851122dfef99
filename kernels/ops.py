"""The kernels' public functions: log-probabilities without [T, V] logits, and the DPO loss.

On a CPU they run in plain PyTorch (`kernels/reference.py`, the definition of every number here), on CUDA in Triton,
which has not run on a GPU yet.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from srlm_mega.kernels import checks, reference
from srlm_mega.kernels.collectives import num_ranks
from srlm_mega.kernels.reference import DpoLoss, DpoSettings, LossType

__all__ = ["DpoLoss", "DpoSettings", "LossType", "Save", "dpo_loss", "vp_linear_logprob", "vp_logprob_"]

Save = Literal["exp", "recompute"]


def vp_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    *,
    vocab_start: int,
    tp_group: ProcessGroup | None,
    sequence_parallel: bool = False,
    save: Save = "exp",
    chunk_rows: int = 1024,
) -> Tensor:
    """Return log p of the next tokens, [N], straight from the last hidden states and the vocabulary's matrix.

    All ranks of `tp_group` call it together, with the same `target` and `rows`. V may be split over them; fp32 logits
    exist for `chunk_rows` rows at a time on CUDA.

    hidden: [T, H], fp64, fp32, bf16 or fp16; with `sequence_parallel` [T/tp, H] of this rank.
    weight: [V/tp, H], contiguous, of hidden's dtype: tokens vocab_start and following. Ranks follow one another; the
    last may hold fewer (an odd vocabulary without its padding).
    target: [N] int64, token ids of the whole vocabulary; -100 gives log p 0 and no gradient.
    rows: [N] int32 or int64, different positions in T that are computed, or None for all T in their order. N may be 0.
    vocab_start: the token of this rank's first row of `weight`; 0 without a group.
    tp_group: the tensor-parallel ranks that share the vocabulary; None when this process has all of it.
    sequence_parallel: the positions, too, are split over `tp_group`.
    save: on CUDA, "exp" keeps exp(z - max) [N, V/tp] in hidden's dtype for the backward pass, "recompute" keeps nothing
    and multiplies once more. It does not change what is returned; on a CPU it has no effect.
    chunk_rows: rows computed at a time on CUDA; on a CPU it has no effect.

    Returns [N] fp32 (fp64 for fp64), in nats, the same on every rank. Logits are fp32 for every input dtype.
    The gradient of `hidden` is summed over the group (and split again with `sequence_parallel`). On CUDA the gradient
    of `weight` is added to Megatron's fp32 `weight.main_grad` where there is one.

    Raises ValueError, which names the argument, on shapes, dtypes, devices and settings that do not fit each other, and
    on a CPU on values too. On CUDA no value is read: a target that no rank owns gives -inf, so check targets and rows
    with `kernels.checks` before they are sent there.
    """
    checks.check_tensor("hidden", hidden, checks.FLOATS, None, None)
    checks.check_tensor("weight", weight, (hidden.dtype,), None, hidden.shape[1], device=hidden.device)
    checks.require(weight.is_contiguous(), "weight", f"strides {weight.stride()}", "a contiguous tensor")
    num_positions = hidden.shape[0] * (num_ranks(tp_group) if sequence_parallel else 1)
    num_targets = num_positions if rows is None else None
    _check_target(target, num_targets, hidden.device, weight.shape[0], vocab_start, tp_group)
    if rows is not None:
        checks.check_tensor("rows", rows, checks.INTEGERS, target.shape[0], device=hidden.device)
        if not rows.is_cuda:
            checks.check_rows(rows, num_positions)
    checks.require(chunk_rows > 0, "chunk_rows", chunk_rows, "a positive number")
    checks.require(save in ("exp", "recompute"), "save", save, "exp or recompute")
    if runs_triton(hidden) and len(target) > 0:
        from srlm_mega.kernels import logprob

        head = logprob.Head(vocab_start, tp_group, sequence_parallel, save, chunk_rows)
        return logprob.vp_linear_logprob(hidden, weight, target, rows, head)
    return reference.vp_linear_logprob(
        hidden,
        weight,
        target,
        rows,
        vocab_start=vocab_start,
        tp_group=tp_group,
        sequence_parallel=sequence_parallel,
    )


def vp_logprob_(logits: Tensor, target: Tensor, *, vocab_start: int, tp_group: ProcessGroup | None) -> Tensor:
    """Return log p, [T] fp32 (fp64 for fp64), at target [T] int64 of logits [T, V/tp] split over the group.

    logits: contiguous; this rank's columns are the tokens vocab_start and following. A target of -100 gives log p 0 and
    no gradient. tp_group: the ranks that share the vocabulary, or None.

    On CUDA the backward pass writes the gradient into the buffer of `logits`, hence the name: nobody else may need it.
    Raises ValueError, which names the argument, on arguments that do not fit each other.
    """
    checks.check_tensor("logits", logits, checks.FLOATS, None, None)
    checks.require(logits.is_contiguous(), "logits", f"strides {logits.stride()}", "a contiguous tensor")
    _check_target(target, logits.shape[0], logits.device, logits.shape[1], vocab_start, tp_group)
    if runs_triton(logits) and len(target) > 0:
        from srlm_mega.kernels import logprob

        return logprob.vp_logprob_(logits, target, vocab_start, tp_group)
    return reference.vp_logprob(logits, target, vocab_start=vocab_start, tp_group=tp_group)


def dpo_loss(
    logp: Tensor,
    cu_seqlens: Tensor,
    pairs: Tensor,
    ref_logp: Tensor,
    settings: DpoSettings,
    consistency: Tensor | None = None,
) -> DpoLoss:
    """Return the loss of P preference pairs from the log p of their response tokens, and the sums of TRL's metrics.

    logp: [N] fp32 or fp64, in nats: response tokens only (they are counted), of S sequences one after the other.
    cu_seqlens: [S + 1] int32 or int64, bounds of the sequences: 0, ..., N.
    pairs: [P, 2] int32 or int64, (chosen, rejected) sequence numbers, each sequence in at most one pair. P and S may
    be 0; a sequence in no pair has no gradient.
    ref_logp: [S] fp32 or fp64, summed log p of the sequences under the reference, in nats.
    settings: DpoSettings(beta, loss_type="sigmoid", label_smoothing=0, rpo_alpha=0, chosen_tokens_per_pair=0).
    consistency: None, or [P] fp32, values in [0, 1], for sigmoid without label_smoothing: pair p's loss is
    consistency[p] * loss(margin) + (1 - consistency[p]) * loss(-margin), as in CREAM (arXiv 2410.12735).

    A pair's margin is the difference of its two log ratios logp - ref_logp, of sums over tokens. With x = beta * margin
    and e = label_smoothing its loss is, by `loss_type`:
    sigmoid: -(1 - e) * log sigmoid(x) - e * log sigmoid(-x), with 0 <= e < 1: DPO, or conservative DPO.
    robust: (-(1 - e) * log sigmoid(x) + e * log sigmoid(-x)) / (1 - 2e), with 0 <= e < 0.5: robust DPO.
    hinge: max(0, 1 - x), with e = 0: SLiC.
    ipo: (margin - 1 / (2 * beta))^2, with e = 0; this margin is that of means per token, as in TRL.

    Returns `DpoLoss`:
    loss [], the only one with a gradient: the sum of the pairs' losses - rpo_alpha * (sum of chosen logp) /
    chosen_tokens_per_pair, which is the global batch's mean. Added up over micro batches and ranks and divided by the
    pairs of the global batch, it is the mean over pairs plus rpo_alpha times the mean -log p of a chosen token.
    sums [8] fp64, over these pairs: loss without the rpo_alpha term, chosen rewards, rejected rewards, pairs with a
    margin above 0, chosen log p, rejected log p, chosen tokens, pairs. A reward is beta * (logp - ref_logp), summed.
    seq_logp [S], summed log p; per_pair [P], losses without the rpo_alpha term.

    Raises ValueError, which names the argument, on shapes, dtypes, devices and settings that do not fit each other, and
    on a CPU on values too (bounds, pairs, consistency). On CUDA no value is read.
    """
    _check_dpo(logp, cu_seqlens, pairs, ref_logp)
    if consistency is not None:
        _check_consistency(consistency, pairs, settings)
    if runs_triton(logp) and len(pairs) > 0:
        from srlm_mega.kernels import dpo_kernel

        return dpo_kernel.dpo_loss(logp, cu_seqlens, pairs, ref_logp, settings, consistency)
    return reference.dpo_loss(logp, cu_seqlens, pairs, ref_logp, settings, consistency)


def runs_triton(tensor: Tensor) -> bool:
    """Tell whether Triton computes with this tensor: on CUDA all but fp64. A CPU machine need not have Triton."""
    return bool(tensor.is_cuda and tensor.dtype != torch.float64)


def _check_target(
    target: Tensor,
    num_targets: int | None,
    device: torch.device,
    columns: int,
    vocab_start: int,
    tp_group: ProcessGroup | None,
) -> None:
    """Raise ValueError unless the targets and this rank's columns of the vocabulary fit each other and the group."""
    checks.check_tensor("target", target, (torch.int64,), num_targets, device=device)
    ranks, rank = (1, 0) if tp_group is None else (tp_group.size(), tp_group.rank())
    checks.require(columns > 0, "vocabulary", columns, "at least one token on this rank")
    last = rank == ranks - 1
    may_be_short = last and rank > 0
    fits = vocab_start >= rank * columns if may_be_short else vocab_start == rank * columns
    expected = f"{rank * columns}{' or more' if may_be_short else ''} on rank {rank}"
    checks.require(fits, "vocab_start", vocab_start, expected)
    if not target.is_cuda:
        checks.check_targets(target, vocab_start + columns if last else columns * ranks)


def _check_dpo(logp: Tensor, cu_seqlens: Tensor, pairs: Tensor, ref_logp: Tensor) -> None:
    device, floats = logp.device, (torch.float32, torch.float64)
    checks.check_tensor("logp", logp, floats, None)
    checks.check_tensor("ref_logp", ref_logp, floats, None, device=device)
    checks.check_tensor("cu_seqlens", cu_seqlens, checks.INTEGERS, ref_logp.shape[0] + 1, device=device)
    checks.check_tensor("pairs", pairs, checks.INTEGERS, None, 2, device=device)
    if not logp.is_cuda:
        checks.check_segments(cu_seqlens, logp.shape[0])
        checks.check_pairs(pairs, ref_logp.shape[0])


def _check_consistency(consistency: Tensor, pairs: Tensor, settings: DpoSettings) -> None:
    checks.check_tensor("consistency", consistency, (torch.float32,), len(pairs), device=pairs.device)
    checks.require(settings.loss_type == "sigmoid", "loss_type", settings.loss_type, "sigmoid with consistency")
    smoothing = settings.label_smoothing
    checks.require(smoothing == 0, "label_smoothing", smoothing, "0 with consistency")
    if not consistency.is_cuda:
        checks.check_shares(consistency)
