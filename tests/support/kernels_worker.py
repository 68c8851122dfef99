"""Run by test_kernels_interpreter.py with TRITON_INTERPRET=1, alone or under torchrun: writes what it measured."""

import json
import sys
from pathlib import Path
from typing import Any

import kernels_cases as cases
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from srlm_mega.kernels import dpo_kernel, logprob, ops, reference

CPU = torch.device("cpu")


def head(hidden: Tensor, weight: Tensor, target: Tensor, rows: Tensor | None, **options: Any) -> Tensor:
    """What ops.vp_linear_logprob calls on CUDA."""
    return logprob.vp_linear_logprob(hidden, weight, target, rows, logprob.Head(**options))


def large_logits(group: ProcessGroup | None) -> dict[str, float]:
    """vp_logprob_ of logits up to +-1e4: the largest error of log p beyond 2^-23 of its size, and of the gradient."""
    rank, world_size = (0, 1) if group is None else (group.rank(), group.size())
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 61 * world_size, generator=generator) * 3
    logits[0, 5], logits[1, -1], logits[2, 0], logits[2, 1] = 1e4, -1e4, 1e4, 1e4
    logits[3] = 1e4
    logits[4, ::2] = -1e4
    target = torch.tensor([5, 61 * world_size - 1, 1, 7, 0, 61 * world_size - 1, -100, 60, 2])
    grad = torch.randn(9, generator=generator)
    own = logits[:, rank * 61 : (rank + 1) * 61].clone(memory_format=torch.contiguous_format).requires_grad_()
    buffer = own.data_ptr()
    logp = logprob.vp_logprob_(own, target, rank * 61, group)
    (found,) = torch.autograd.grad(logp, own, grad)
    whole = logits.double().requires_grad_()
    true_logp = reference.vp_logprob(whole, target, vocab_start=0, tp_group=None)
    (true,) = torch.autograd.grad(true_logp, whole, grad.double())
    return {
        "logp": float(((logp - true_logp).abs() - true_logp.abs() * 2**-23).detach().max()),
        "gradient": float((found - true[:, rank * 61 : (rank + 1) * 61]).abs().max()),
        "elsewhere": float(found.data_ptr() != buffer),
        "largest": float(true_logp.detach().abs().max()),
    }


def nothing_to_compute(group: ProcessGroup | None) -> float:
    """The gradients' size where no rank has a row; a rank that skipped a collective would hang the others."""
    start = 0 if group is None else 5 * group.rank()
    hidden, weight = torch.ones(3, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    logp = ops.vp_linear_logprob(
        hidden, weight, none, none, vocab_start=start, tp_group=group, sequence_parallel=group is not None
    )
    return float(sum(grad.abs().sum() for grad in torch.autograd.grad(logp.sum(), [hidden, weight])))


def second_backward(save: str) -> str:
    """What a second backward pass through the same graph says."""
    hidden, weight = torch.randn(2, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    options = {"vocab_start": 0, "tp_group": None, "sequence_parallel": False, "save": save, "chunk_rows": 8}
    logp = head(hidden, weight, torch.tensor([0, 7]), None, **options)
    first = torch.autograd.grad(logp.sum(), [hidden, weight], retain_graph=True)
    try:
        second = torch.autograd.grad(logp.sum(), [hidden, weight])
    except AssertionError as error:
        return str(error)
    return "equal" if all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) else "different"


def unknown_loss() -> str:
    """What the kernel says to a loss that it does not have, behind the checks of `ops`."""
    logp, pairs, bounds, ref = torch.zeros(2), torch.tensor([[0, 1]]), torch.tensor([0, 1, 2]), torch.zeros(2)
    settings = reference.DpoSettings(0.1)
    object.__setattr__(settings, "loss_type", "kto")
    try:
        dpo_kernel.dpo_loss(logp, bounds, pairs, ref, settings)
    except Exception as error:  # Triton's own, around what the kernel raised
        return f"{error!r}, {error.__cause__!r}"
    return "nothing"


def largest(values: dict[str, Any], group: ProcessGroup | None) -> dict[str, Any]:
    """The largest of each number over the ranks, in nested dictionaries."""
    if group is None:
        return values
    gathered: list[dict[str, Any]] = [{} for _ in range(group.size())]
    torch.distributed.all_gather_object(gathered, values, group=group)
    return merge(gathered)


def merge(many: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest of each number."""
    return {
        key: merge([one[key] for one in many]) if isinstance(value, dict) else max(one[key] for one in many)
        for key, value in many[0].items()
    }


def main() -> None:
    """All cases at this world size."""
    torch.set_num_threads(1)
    world_size, out = int(sys.argv[1]), Path(sys.argv[2])
    group = None
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
        group = torch.distributed.group.WORLD
    own = cases.CASES + (cases.ONE_RANK_CASES if world_size == 1 else ())
    results: dict[str, Any] = {case.name: cases.run(case, head, group, CPU).as_json() for case in own}
    for case in own:
        results[f"reference, {case.name}"] = cases.run(case, ops.vp_linear_logprob, group, CPU).as_json()
    results["nothing to compute"] = nothing_to_compute(group)
    results["large logits"] = large_logits(group)
    results = largest(results, group)
    if world_size == 1:
        results["second backward"] = {save: second_backward(save) for save in ("exp", "recompute")}
        results["unknown loss"] = unknown_loss()
        for loss_type, smoothing in cases.DPO_LOSSES:
            results[f"dpo {loss_type} {smoothing}"] = cases.run_dpo(dpo_kernel.dpo_loss, loss_type, smoothing, CPU)
        results["dpo per pair"] = cases.run_dpo(dpo_kernel.dpo_loss, "sigmoid", 0.0, CPU, cases.CONSISTENCY)
    if group is None or group.rank() == 0:
        out.write_text(json.dumps(results))
    if group is not None:  # a rank that leaves while gloo's threads run can abort
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
