"""What a run of the head's kernels is compared with: shared by the interpreter's worker and the tests on a GPU.

Truth is the reference in fp64 on the whole vocabulary. "Eager" is PyTorch as it is commonly written, in the inputs'
dtype and on the whole vocabulary: how far that is from truth is how far a kernel may be.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from srlm_mega.kernels import reference
from srlm_mega.kernels.checks import IGNORE_INDEX
from srlm_mega.kernels.reference import DpoLoss, DpoSettings, LossType

Op = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A call of `vp_linear_logprob`: sizes of one rank's columns, and what is special about it."""

    name: str
    num_rows: int | None  # None: all positions
    columns: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    save: Literal["exp", "recompute"] = "exp"
    chunk_rows: int = 1024
    sequence_parallel: bool = False
    targets: Literal["random", "masked", "edges"] = "random"
    missing: int = 0  # so many columns fewer on the last rank: an odd vocabulary without its padding
    positions: int = 12
    hidden_size: int = 16


CASES = (
    Case("one row", 1, 67),
    Case("all masked", 3, 67, targets="masked"),
    Case("edges of the ranks", 6, 67, targets="edges"),
    Case("edges of an odd vocabulary", 6, 67, targets="edges", missing=5),
    Case("all positions", None, 129, chunk_rows=10),
    Case("two blocks", 4, 4099),
    Case("two blocks, again", 4, 4099, save="recompute", chunk_rows=3),
    Case("sequence parallel", 10, 131, sequence_parallel=True, chunk_rows=4),
    Case("sequence parallel, again", 9, 131, sequence_parallel=True, chunk_rows=4, save="recompute"),
    Case("sequence parallel, all", None, 67, sequence_parallel=True),
    Case("bf16", 12, 1025, dtype="bfloat16"),
    Case("bf16, again", 9, 1025, dtype="bfloat16", save="recompute", chunk_rows=4),
)
ONE_RANK_CASES = (Case("70 rows", 70, 131, chunk_rows=32, positions=80),)


DPO_LOSSES: tuple[tuple[LossType, float], ...] = (
    ("sigmoid", 0.0),
    ("sigmoid", 0.1),
    ("robust", 0.1),
    ("hinge", 0.0),
    ("ipo", 0.0),
)
CONSISTENCY = (0.8, 0.3)  # of run_dpo's pairs


EPS = 2.0**-23  # of fp32
# log p is below 16 here, where fp32 numbers are 8 eps apart. A logit adds up 16 products below 8, and each addition
# rounds by up to 2 eps. Log p subtracts the maximum and the logarithm of a sum, itself rounded: 4 eps each. 44 eps in
# all, and half as much again for another CPU's exp and log. The same bounds the relative error of a gradient: that of
# p = exp(log p) is the error of log p.
LOGP_BOUND = 64 * EPS
# Where logits are so far apart that every p is 0 or 1, the gradient p - 1 is rounded a few times and no more.
CERTAIN_GRADIENT_BOUND = 16 * EPS
# Relative. A dozen operations, exp and log of a GPU among them, which are right to 2 eps; e^x carries |x| eps over from
# x = beta * margin, here up to 2, and robust DPO multiplies by 1 / (1 - 2 * 0.1).
DPO_BOUND = 32 * EPS


@dataclass(frozen=True)
class Errors:
    """Distances from fp64: the largest of a log p, and of the gradients the norm over truth's norm."""

    logp: float
    hidden: float
    weight: float


@dataclass(frozen=True)
class Outcome:
    """How far the kernels are from truth, eager PyTorch, and eager PyTorch with every target moved by one token."""

    ours: Errors
    eager: Errors
    wrong: Errors

    def as_json(self) -> dict[str, dict[str, float]]:
        """For a worker's result file."""
        return asdict(self)


@dataclass(frozen=True)
class Problem:
    """Inputs of a case, all of the vocabulary and all positions."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    rows: Tensor | None
    grad: Tensor


def make_problem(case: Case, world_size: int, device: torch.device) -> Problem:
    """Random inputs, the same on every rank; logits have a standard deviation of about 1.5."""
    generator = torch.Generator().manual_seed(case.columns)
    vocab_size = case.columns * world_size - case.missing
    num_rows = case.positions if case.num_rows is None else case.num_rows
    dtype = getattr(torch, case.dtype)
    hidden = torch.randn(case.positions, case.hidden_size, generator=generator) * 1.5 / case.hidden_size**0.5
    target = torch.randint(vocab_size, (num_rows,), generator=generator)
    if case.targets == "masked":
        target.fill_(IGNORE_INDEX)
    elif case.targets == "edges":
        edges = torch.arange(world_size)[:, None] * case.columns + torch.tensor([0, case.columns - 1])
        target = edges.flatten().clamp(max=vocab_size - 1).repeat(num_rows)[:num_rows]
    elif num_rows > 2:
        target[1] = IGNORE_INDEX
    rows = None if case.num_rows is None else torch.randperm(case.positions, generator=generator)[:num_rows]
    return Problem(
        hidden.to(dtype).to(device),
        torch.randn(vocab_size, case.hidden_size, generator=generator).to(dtype).to(device),
        target.to(device),
        None if rows is None else rows.to(device),
        torch.randn(num_rows, generator=generator).to(device),
    )


def run(case: Case, op: Op, group: ProcessGroup | None, device: torch.device) -> Outcome:
    """One case on this rank; the largest errors of all ranks are for the caller to find."""
    rank, world_size = (0, 1) if group is None else (group.rank(), group.size())
    problem = make_problem(case, world_size, device)
    own_columns = slice(rank * case.columns, min((rank + 1) * case.columns, len(problem.weight)))
    share = case.positions // world_size
    own_positions = slice(rank * share, (rank + 1) * share) if case.sequence_parallel else slice(None)
    truth = whole(problem, torch.float64)

    def errors(logp: Tensor, hidden: Tensor, weight: Tensor) -> Errors:
        true_logp, true_hidden, true_weight = truth
        return Errors(
            float((logp.double() - true_logp).abs().max()),
            distance(hidden, true_hidden[own_positions]),
            distance(weight, true_weight[own_columns]),
        )

    def eager_errors(target: Tensor) -> Errors:
        logp, hidden, weight = eager(problem, target)
        return errors(logp, hidden[own_positions], weight[own_columns])

    hidden = problem.hidden[own_positions].clone().requires_grad_()
    weight = problem.weight[own_columns].clone().requires_grad_()
    logp = op(
        hidden,
        weight,
        problem.target,
        problem.rows,
        vocab_start=rank * case.columns,
        tp_group=group,
        sequence_parallel=case.sequence_parallel,
        save=case.save,
        chunk_rows=case.chunk_rows,
    )
    ours = errors(logp.detach(), *torch.autograd.grad(logp, [hidden, weight], problem.grad))
    moved = (problem.target + 1) % len(problem.weight)  # a masked row becomes a token
    return Outcome(ours, eager_errors(problem.target), eager_errors(moved))


def whole(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """log p and both gradients of the reference on one rank."""
    hidden = problem.hidden.to(dtype).requires_grad_()
    weight = problem.weight.to(dtype).requires_grad_()
    logp = reference.vp_linear_logprob(
        hidden, weight, problem.target, problem.rows, vocab_start=0, tp_group=None, sequence_parallel=False
    )
    return logp.detach(), *torch.autograd.grad(logp, [hidden, weight], problem.grad.to(dtype))


def eager(problem: Problem, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p and both gradients of a linear layer in the inputs' dtype, log softmax of its result in fp32."""
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    selected = hidden if problem.rows is None else hidden[problem.rows]
    logp = -F.cross_entropy(F.linear(selected, weight).float(), target, reduction="none")
    return logp.detach(), *torch.autograd.grad(logp, [hidden, weight], problem.grad)


def distance(found: Tensor, true: Tensor) -> float:
    """|found - true| / |true|, or |found| where truth is zero."""
    return float((found.double() - true).norm() / true.norm().clamp(min=1e-30)) if true.any() else float(found.norm())


def run_dpo(
    loss: Callable[..., DpoLoss],
    loss_type: LossType,
    smoothing: float,
    device: torch.device,
    consistency: tuple[float, ...] | None = None,
) -> dict[str, Any]:
    """The loss kernel against the reference in fp64: sequences of 5, 1295, 0, 700, 100 tokens, the last in no pair.

    The log p are multiples of 1/64, so that fp32 sums of them are exact: what is left is the error of the formulas.
    """
    generator = torch.Generator().manual_seed(2)
    logp = -torch.randint(128, (2100,), generator=generator) / 64
    bounds = torch.tensor([0, 5, 1300, 1300, 2000, 2100], dtype=torch.int32)
    pairs = torch.tensor([[0, 1], [3, 2]])
    ref = reference.segment_sums(logp, bounds) + torch.randint(-160, 160, (5,), generator=generator) / 16
    logp, bounds, pairs, ref = (tensor.to(device) for tensor in (logp, bounds, pairs, ref))
    settings = DpoSettings(0.1, loss_type, smoothing, rpo_alpha=0.2, chosen_tokens_per_pair=340.0)
    shares = None if consistency is None else torch.tensor(consistency, device=device)

    def launch() -> tuple[DpoLoss, Tensor]:
        leaf = logp.clone().requires_grad_()
        out = loss(leaf, bounds, pairs, ref, settings, shares)
        return out, torch.autograd.grad(out.loss, leaf)[0]

    (out, grad), (again, grad_again) = launch(), launch()
    leaf = logp.double().requires_grad_()
    true = reference.dpo_loss(leaf, bounds, pairs, ref, settings, shares)
    (true_grad,) = torch.autograd.grad(true.loss, leaf)
    unsmoothed = reference.dpo_loss(leaf, bounds, pairs, ref, replace(settings, label_smoothing=0.0))
    equal = [torch.equal(a, b) for a, b in [(out.loss, again.loss), (out.sums, again.sums), (grad, grad_again)]]
    return {
        "loss": distance(out.loss, true.loss.detach()),
        "sums": float(((out.sums - true.sums).abs() / true.sums.abs().clamp(min=1)).max()),
        "seq_logp": distance(out.seq_logp, true.seq_logp),
        "per_pair": distance(out.per_pair, true.per_pair),
        "gradient": distance(grad, true_grad),
        "bit equal": all(equal),
        "without smoothing": distance(out.per_pair, unsmoothed.per_pair),
        "unpaired": float(grad[2000:].abs().sum()),
    }
