"""What training calls: log-probabilities without [T, V] logits, and the DPO loss. Plain PyTorch on a CPU, else Triton.

`kernels/reference.py` is the definition of every number here. Nothing of this ran on a GPU yet.
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
    """log p of the next tokens, straight from the last hidden states and the vocabulary's matrix: logp [N].

    hidden: [T, H]; with `sequence_parallel` [T/tp, H] of this rank.
    weight: [V/tp, H], contiguous, of hidden's dtype: tokens vocab_start and following. Ranks follow one another; the
    last may hold fewer (an odd vocabulary without its padding).
    target: [N] token ids of the whole vocabulary; -100 gives log p 0 and no gradient.
    rows: [N] different positions in T that are computed, or None for all T in their order. N may be 0.
    Returns [N] fp32 (fp64 for fp64), the same on every rank of `tp_group`. Logits are fp32 for every input dtype.

    The gradient of `hidden` is summed over the group (and split again with `sequence_parallel`).
    On CUDA, `chunk_rows` rows at a time; `save`: "exp" keeps exp(z - max) in hidden's dtype for the backward pass
    ([N, V/tp]), "recompute" keeps nothing and multiplies once more. Neither changes what is returned on a CPU.
    All ranks of the group must call with the same N. Raises ValueError on arguments that do not fit each other.
    On CUDA a target that no rank owns gives -inf: values are not read there (see `kernels/checks.py`).
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
    """log p at target [T] of logits [T, V/tp] split over the group: logp [T] fp32 (fp64 for fp64).

    On CUDA the backward pass writes the gradient into the buffer of `logits`, hence the name: nobody else may need it.
    Raises ValueError on arguments that do not fit each other.
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
    """The loss of P preference pairs from the log p of their response tokens, and the sums of TRL's metrics.

    logp: [N] fp32 or fp64, in nats: response tokens only (they are counted), of S sequences one after the other.
    cu_seqlens: [S + 1] int32 or int64, bounds of the sequences: 0, ..., N.
    pairs: [P, 2] int32 or int64, (chosen, rejected) sequence numbers, each sequence in at most one pair. P and S may
    be 0; a sequence in no pair has no gradient.
    ref_logp: [S] fp32 or fp64, summed log p of the sequences under the reference, in nats.
    settings: beta, loss_type, label_smoothing, rpo_alpha, chosen_tokens_per_pair; see `DpoSettings`.
    consistency: None, or [P] fp32, values in [0, 1], for sigmoid without label_smoothing: pair p's loss is
    consistency[p] * loss(margin) + (1 - consistency[p]) * loss(-margin), as in CREAM (arXiv 2410.12735).

    Returns `DpoLoss`: loss [] (the only one with a gradient), sums [8] fp64, seq_logp [S], per_pair [P].
    loss = sum over pairs of the loss of `loss_type` - rpo_alpha * (sum of chosen logp) / chosen_tokens_per_pair, to be
    added up over micro batches and ranks and divided by the pairs of the global batch: then it is the mean over pairs
    plus rpo_alpha times the mean -log p of a chosen token.
    A pair's margin is the difference of its two log ratios logp - ref_logp, of sums over tokens; "ipo" takes means per
    token, as TRL does.

    Raises ValueError, which names the argument, on shapes, dtypes, devices and settings that do not fit each other, and
    on a CPU on values too (bounds, pairs, consistency). Nothing is read back to the host.
    """
    _check_dpo(logp, cu_seqlens, pairs, ref_logp)
    if consistency is not None:
        _check_consistency(consistency, pairs, settings)
    if runs_triton(logp) and len(pairs) > 0:
        from srlm_mega.kernels import dpo_kernel

        return dpo_kernel.dpo_loss(logp, cu_seqlens, pairs, ref_logp, settings, consistency)
    return reference.dpo_loss(logp, cu_seqlens, pairs, ref_logp, settings, consistency)


def runs_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels take this tensor: on CUDA, all but fp64. A CPU machine need not have Triton."""
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
