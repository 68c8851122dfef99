"""Collectives of tensor-parallel ranks in the head, with gradients. Groups of None or of one rank do nothing."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work


def num_ranks(group: ProcessGroup | None) -> int:
    """Return the size of a group; None is this process alone."""
    return 1 if group is None else group.size()


def copy_to_ranks(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the tensor, which every rank has; in the backward pass its gradients are summed over the ranks."""
    return tensor if num_ranks(group) == 1 else _CopyToRanks.apply(tensor, group)


def gather_sequence(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return [T, H] from each rank's [T/tp, H]; in the backward pass the gradient is summed and split again."""
    return tensor if num_ranks(group) == 1 else _GatherSequence.apply(tensor, group)


def sum_over_ranks(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the sum over the ranks; in the backward pass each rank takes the gradient of the sum, which all know."""
    return tensor if num_ranks(group) == 1 else _SumOverRanks.apply(tensor, group)


def max_over_ranks(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the elementwise maximum over the ranks, without a gradient."""
    tensor = tensor.detach().clone()
    if num_ranks(group) > 1:
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=group)
    return tensor


@dataclass(frozen=True)
class Pending:
    """A collective that may still be running."""

    tensor: Tensor
    work: Work | None

    def wait(self) -> Tensor:
        """Return the result; what the GPU is given from now on comes after it."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


def start_all_gather(tensor: Tensor, group: ProcessGroup | None) -> Pending:
    """Start to gather each rank's [n, ...] into [tp * n, ...], in the order of the ranks."""
    if num_ranks(group) == 1:
        return Pending(tensor, None)
    gathered = tensor.new_empty(num_ranks(group) * tensor.shape[0], *tensor.shape[1:])
    return Pending(gathered, torch.distributed.all_gather_into_tensor(gathered, tensor, group=group, async_op=True))


def start_all_reduce(tensor: Tensor, group: ProcessGroup | None) -> Pending:
    """Start to sum `tensor` over the ranks, in place."""
    if num_ranks(group) == 1:
        return Pending(tensor, None)
    return Pending(tensor, torch.distributed.all_reduce(tensor, group=group, async_op=True))


def start_reduce_scatter(tensor: Tensor, group: ProcessGroup | None) -> Pending:
    """Start to sum each rank's [tp * n, ...]; the result is this rank's [n, ...] of the sum."""
    if num_ranks(group) == 1:
        return Pending(tensor, None)
    own = tensor.new_empty(tensor.shape[0] // num_ranks(group), *tensor.shape[1:])
    return Pending(own, torch.distributed.reduce_scatter_tensor(own, tensor, group=group, async_op=True))


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_all_reduce(grads[0].clone(memory_format=torch.contiguous_format), ctx.group).wait(), None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return start_all_gather(tensor.contiguous(), group).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_reduce_scatter(grads[0].contiguous(), ctx.group).wait(), None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        return start_all_reduce(tensor.clone(memory_format=torch.contiguous_format), group).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
