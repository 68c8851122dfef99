"""Log-probabilities of targets without [T, V] fp32 logits, from the GEMM library, the row kernels and collectives.

Forward: fp32 logits of some rows at a time, in a buffer that is reused, then one kernel over it (`row_kernels.py`).
Backward with save="exp": exp(z - max), kept in the inputs' dtype, becomes the gradient of the logits in place, then two
GEMMs. With save="recompute" nothing of size [N, V] is kept, and the logits are computed again, some rows at a time.
Nothing of this has run on a GPU yet; Triton's interpreter runs it on a CPU.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from srlm_mega.kernels.checks import IGNORE_INDEX
from srlm_mega.kernels.collectives import Pending, start_all_gather, start_all_reduce, start_reduce_scatter
from srlm_mega.kernels.row_kernels import Softmax, row_gradient, row_stats
from srlm_mega.kernels.weight_gradient import WeightGradient


@dataclass(frozen=True)
class Head:
    """The arguments of `ops.vp_linear_logprob` that are not tensors; its docstring says what each means."""

    vocab_start: int
    tp_group: ProcessGroup | None
    sequence_parallel: bool
    save: Literal["exp", "recompute"]
    chunk_rows: int


def vp_linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor, rows: Tensor | None, head: Head) -> Tensor:
    """Compute what `ops.vp_linear_logprob` documents, for N > 0."""
    logp: Tensor = _LinearLogprob.apply(hidden, weight, target, rows, head, torch.is_grad_enabled())
    return logp


def vp_logprob_(logits: Tensor, target: Tensor, vocab_start: int, tp_group: ProcessGroup | None) -> Tensor:
    """Compute what `ops.vp_logprob_` documents, for T > 0."""
    logp: Tensor = _Logprob.apply(logits, target, vocab_start, tp_group)
    return logp


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, rows: Tensor | None, head: Head, with_grad: bool
    ) -> Tensor:
        selected = _select(_whole(hidden, head), rows)
        keep = head.save == "exp" and with_grad and any(ctx.needs_input_grad)
        exps = weight.new_empty(len(target), len(weight)) if keep else None
        stats = weight.new_empty(len(target), 3, dtype=torch.float32)
        buffer = _logits_buffer(weight, target, head)
        gathers = []
        for part in _parts(len(target), head.chunk_rows):
            logits = _logits(selected[part], weight, buffer)
            row_stats(logits, target[part], None if exps is None else exps[part], stats[part], head.vocab_start)
            gathers.append(start_all_gather(stats[part][None], head.tp_group))
        softmax = _combine(torch.cat([gather.wait() for gather in gathers], 1), target)
        # exp(z - m) was kept with this rank's own maximum m: seen from there the maximum over all ranks is peak - m.
        peak = softmax.peak - stats[:, 0] if keep else softmax.peak
        ctx.save_for_backward(hidden, weight, target, rows, softmax.logp, peak, softmax.log_total)
        ctx.head, ctx.exps = head, exps
        return softmax.logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, rows, *per_row = ctx.saved_tensors
        softmax = Softmax(*per_row)
        head: Head = ctx.head
        grad = grads[0].float().contiguous()
        whole = _whole(hidden, head)
        selected = _select(whole, rows)
        grad_rows = weight.new_empty(selected.shape)
        reductions: list[Pending] = []
        from_exp = head.save == "exp"
        buffer = weight.new_empty(0) if from_exp else _logits_buffer(weight, target, head)
        gradients = _take_exps(ctx) if from_exp else torch.empty_like(buffer, dtype=weight.dtype)
        parts = _parts(len(target), len(gradients))
        grad_weight = WeightGradient(weight, len(parts))
        for part in parts:
            dz = gradients[: part.stop - part.start]
            source = dz if from_exp else _logits(selected[part], weight, buffer)
            row_gradient(source, dz, target[part], grad[part], softmax.part(part), head.vocab_start, from_exp)
            torch.mm(dz, weight, out=grad_rows[part])
            # Before the weight's GEMM, so that communication overlaps it. As with Megatron's linear layers the GPU
            # keeps this order with CUDA_DEVICE_MAX_CONNECTIONS=1.
            if not head.sequence_parallel:
                reductions.append(start_all_reduce(grad_rows[part], head.tp_group))
            elif part.stop == len(target):  # a reduce-scatter splits all positions, so it waits for the last part
                reductions.append(start_reduce_scatter(_scatter(grad_rows, rows, len(whole)), head.tp_group))
            grad_weight.add(dz, selected[part])
        reduced = [reduction.wait() for reduction in reductions]
        grad_hidden = reduced[-1] if head.sequence_parallel else _scatter(grad_rows, rows, len(whole))
        return grad_hidden, grad_weight.result(), None, None, None, None


def _take_exps(ctx: Any) -> Tensor:
    """Take exp(z - max) [N, V/tp] of the forward pass, which the backward pass overwrites."""
    exps: Tensor | None = ctx.exps
    assert exps is not None, "a second backward pass: the first one overwrote what was kept"
    ctx.exps = None
    return exps


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, vocab_start: int, tp_group: ProcessGroup | None) -> Tensor:
        stats = logits.new_empty(len(target), 3, dtype=torch.float32)
        row_stats(logits, target, None, stats, vocab_start)
        softmax = _combine(start_all_gather(stats[None], tp_group).wait(), target)
        # Not saved by autograd: that would refuse the backward pass, which overwrites them.
        ctx.logits, ctx.vocab_start = logits, vocab_start
        ctx.save_for_backward(target, softmax.logp, softmax.peak, softmax.log_total)
        return softmax.logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits = ctx.logits
        assert logits is not None, "a second backward pass: the first one overwrote the logits"
        ctx.logits = None
        grad = grads[0].float().contiguous()
        target, *per_row = ctx.saved_tensors
        row_gradient(logits, logits, target, grad, Softmax(*per_row), ctx.vocab_start, from_exp=False)
        return logits, None, None, None


def _combine(stats: Tensor, target: Tensor) -> Softmax:
    """Combine each rank's max z, sum exp(z - max) and z at the target, [tp, n, 3], into the softmax of n rows."""
    peaks, totals, at_target = stats.unbind(2)
    peak = peaks.amax(0)
    log_total = (totals * (peaks - peak).exp()).sum(0).log()
    logp = (at_target.amax(0) - peak) - log_total
    return Softmax(logp.where(target != IGNORE_INDEX, 0), peak, log_total)


def _whole(hidden: Tensor, head: Head) -> Tensor:
    return start_all_gather(hidden.contiguous(), head.tp_group).wait() if head.sequence_parallel else hidden


def _select(hidden: Tensor, rows: Tensor | None) -> Tensor:
    return hidden if rows is None else hidden.index_select(0, rows)


def _scatter(grad_rows: Tensor, rows: Tensor | None, num_positions: int) -> Tensor:
    """Return the gradient of all positions from that of the selected rows, which are all different."""
    if rows is None:
        return grad_rows
    return grad_rows.new_zeros(num_positions, grad_rows.shape[1]).index_copy_(0, rows.long(), grad_rows)


def _parts(num_rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _logits_buffer(weight: Tensor, target: Tensor, head: Head) -> Tensor:
    return weight.new_empty(min(len(target), head.chunk_rows), len(weight), dtype=torch.float32)


def _logits(selected: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """Write the fp32 logits [n, V/tp] of hidden states [n, H] into the buffer; return its n rows."""
    out = buffer[: len(selected)]
    if weight.dtype == torch.float32:
        return torch.mm(selected, weight.T, out=out)
    if weight.is_cuda:
        return torch.mm(selected, weight.T, out_dtype=torch.float32, out=out)
    return torch.mm(selected.float(), weight.T.float(), out=out)  # this product of two dtypes exists on CUDA only
