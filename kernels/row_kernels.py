"""Triton, one program per row of the logits: softmax statistics, and the gradient.

Launches are chosen from a table, not by autotuning: every configuration is compiled ahead of time by a test.
None of them has run on a GPU yet.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from srlm_mega.kernels.checks import IGNORE_INDEX


@dataclass(frozen=True)
class Softmax:
    """Statistics of each row [n] over all ranks' columns: log p of the target, max z, log sum exp(z - max)."""

    logp: Tensor
    peak: Tensor
    log_total: Tensor

    def part(self, rows: slice) -> "Softmax":
        """Return the statistics of some rows."""
        return Softmax(self.logp[rows], self.peak[rows], self.log_total[rows])


@dataclass(frozen=True)
class RowConfig:
    """A launch configuration: columns per iteration, and warps."""

    block: int
    num_warps: int


NARROW_COLUMNS, NARROW_ROW = 1024, RowConfig(1024, 4)  # tests and toys
# 4096 columns with 4 warps spill registers on sm_100. A second pass over a row of 32,000 finds it in the L2 cache.
WIDE_ROW = RowConfig(4096, 8)
SHIPPED_CONFIGS = (NARROW_ROW, WIDE_ROW)


def row_config(columns: int) -> RowConfig:
    """Return the configuration for rows of `columns` columns."""
    return NARROW_ROW if columns <= NARROW_COLUMNS else WIDE_ROW


@triton.jit  # type: ignore[untyped-decorator]
def row_stats_kernel(
    logits: tl.tensor,
    target: tl.tensor,
    exps: tl.tensor,
    stats: tl.tensor,
    columns: tl.tensor,
    vocab_start: tl.tensor,
    STORE_EXP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Store stats[row] = max z, sum exp(z - max), z at the target (-inf where another rank owns it).

    With STORE_EXP store exps[row] = exp(z - max) too.
    """
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    logits += row * columns
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        z = tl.load(logits + start + offsets, mask=start + offsets < columns, other=float("-inf"))
        peaks = tl.maximum(peaks, z.to(tl.float32))
    peak = tl.max(peaks, 0)
    totals = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + offsets < columns
        z = tl.load(logits + start + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        e = tl.exp(z - peak)
        totals += e
        if STORE_EXP:
            tl.store(exps + row * columns + start + offsets, e.to(exps.dtype.element_ty), mask=inside)
    column = tl.load(target + row) - vocab_start
    owned = (column >= 0) & (column < columns)
    tl.store(stats + row * 3, peak)
    tl.store(stats + row * 3 + 1, tl.sum(totals, 0))
    tl.store(stats + row * 3 + 2, tl.load(logits + column, mask=owned, other=float("-inf")).to(tl.float32))


@triton.jit  # type: ignore[untyped-decorator]
def row_gradient_kernel(
    source: tl.tensor,
    out: tl.tensor,
    target: tl.tensor,
    grad: tl.tensor,
    logp: tl.tensor,
    peak: tl.tensor,
    log_total: tl.tensor,
    columns: tl.tensor,
    vocab_start: tl.tensor,
    FROM_EXP: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Store out = grad * (1 at the target - softmax). `source` holds z, or exp(z - m) with FROM_EXP; `out` may be it.

    log softmax is (z - peak) - log_total, in this order: z and peak may be large.
    """
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    token = tl.load(target + row)
    column = token - vocab_start
    g = tl.where(token == IGNORE_INDEX, 0.0, tl.load(grad + row))
    at_target = g * (1 - tl.exp(tl.load(logp + row)))
    lower, total = tl.load(peak + row), tl.load(log_total + row)
    scale = -g * tl.exp(-lower - total) if FROM_EXP else -g
    for start in range(0, columns, BLOCK):
        inside = start + offsets < columns
        x = tl.load(source + row * columns + start + offsets, mask=inside, other=0.0).to(tl.float32)
        if not FROM_EXP:
            x = tl.exp((x - lower) - total)
        dz = tl.where(start + offsets == column, at_target, scale * x)
        tl.store(out + row * columns + start + offsets, dz.to(out.dtype.element_ty), mask=inside)


def row_stats(logits: Tensor, target: Tensor, exps: Tensor | None, stats: Tensor, vocab_start: int) -> None:
    """Fill stats [n, 3] fp32 and, where it is given, exps [n, V/tp] from logits [n, V/tp]; see `row_stats_kernel`."""
    num_rows, columns = logits.shape
    config = row_config(columns)
    row_stats_kernel[(num_rows,)](
        logits,
        target,
        logits if exps is None else exps,
        stats,
        columns,
        vocab_start,
        STORE_EXP=exps is not None,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )


def row_gradient(
    source: Tensor, out: Tensor, target: Tensor, grad: Tensor, softmax: Softmax, vocab_start: int, from_exp: bool
) -> None:
    """Write the gradient of the logits [n, V/tp] into `out`, given dL/dlogp in `grad` [n] fp32.

    `source` [n, V/tp] holds the logits or, with `from_exp`, exp(z - m); `softmax.peak` is then max z - m, and `out` may
    be `source` in both cases.
    """
    num_rows, columns = source.shape
    config = row_config(columns)
    row_gradient_kernel[(num_rows,)](
        source,
        out,
        target,
        grad,
        softmax.logp,
        softmax.peak,
        softmax.log_total,
        columns,
        vocab_start,
        FROM_EXP=from_exp,
        IGNORE_INDEX=IGNORE_INDEX,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
