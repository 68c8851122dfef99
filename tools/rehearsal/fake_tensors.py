"""One rank of many in this process alone: tensors without contents, and what the other ranks would have answered.

Shapes, dtypes and storages are torch's own (FakeTensorMode). Integers that the program decides by, such as the lengths
of packed sequences, are computed besides; of all other numbers a host that asks is told 1.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from srlm_mega.tools.rehearsal.watch import name_of, tensors_in
from srlm_mega.training import cpu_backend

T = TypeVar("T")
MOST_COMPUTED = 2**20  # elements of a tensor of integers


@contextmanager
def fake_process_group(rank: int, world_size: int) -> Iterator[None]:
    """Be one rank of a process group whose other ranks are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class FakeRank(TorchDispatchMode):
    """Answers what tensors without contents cannot: integers, collectives, values that the host asks for."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode
        self._known: Any = WeakIdKeyDictionary()  # real integers by their fake tensor

    def fake(self, value: T) -> T:
        """Return a record of real tensors, such as a micro batch, with fake ones in their place."""
        if isinstance(value, Tensor):
            made = self._mode.from_tensor(value)
            if not value.is_floating_point():
                self._known[made] = value
            return made  # type: ignore[no-any-return]
        if is_dataclass(value) and not isinstance(value, type):
            names = [one.name for one in fields(value) if one.init]
            return replace(value, **{name: self.fake(getattr(value, name)) for name in names})
        return [self.fake(one) for one in value] if isinstance(value, list) else value  # type: ignore[return-value]

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Answer an operation, or let fake tensors do it."""
        kwargs = kwargs or {}
        name = name_of(func)
        if name.startswith("c10d."):
            return answered(func, args)
        if name == "aten._local_scalar_dense.default":
            return self._value(args[0])
        computed = self._computed(func, args, kwargs)
        if computed is not None:
            return tree_map(lambda leaf: self.fake(leaf) if isinstance(leaf, Tensor) else leaf, computed)
        if name == "aten.equal.default":
            return True
        return func(*args, **kwargs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard costs as much as the rest

    def _value(self, tensor: Tensor) -> Any:
        known = self._known.get(tensor)
        if known is None:
            return 1.0 if tensor.is_floating_point() else 1
        with _disable_current_modes():
            return known.item()

    def _computed(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return the real result of an operation on known integers; None where it is another."""
        tensors = tensors_in((*args, *kwargs.values()))
        schema = func._schema  # type: ignore[attr-defined]
        if schema.is_mutable:
            for tensor in tensors:
                self._known.pop(tensor, None)
            return None
        if name_of(func) == "aten.lift_fresh.default":
            return None if tensors[0].is_floating_point() else tensors[0]
        if tensors and not all(tensor in self._known and tensor.numel() <= MOST_COMPUTED for tensor in tensors):
            return None
        if not tensors and not name_of(func).startswith("aten.arange"):
            return None
        if kwargs.get("dtype") is not None and kwargs["dtype"].is_floating_point:
            return None
        with _disable_current_modes():
            real = tree_map(lambda leaf: self._known[leaf] if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            result = func(*real[0], **real[1])
        outs = tensors_in((result,))
        return None if any(out.is_floating_point() or out.numel() > MOST_COMPUTED for out in outs) else result


def answered(func: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Return what a collective returns that has ended; its buffers are fake and stay as they are."""
    work = FakeWork().boxed()
    return work if len(func._schema.returns) == 1 else (args[0], work)  # type: ignore[attr-defined]


@contextmanager
def without_contents() -> Iterator[FakeRank]:
    """Let tensors that are made in the block have no contents, and everything that reads them be answered."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        for target, name, stand_in in (
            (cpu_backend.CpuRngStatesTracker, "fork", same_random_state),
            (nn.Module, "_apply", apply_to_fakes),
            (dist, "all_gather_object", own_object_of_all),
            (torch, "tensor", partial(tensor_of_values, torch.tensor)),
        ):
            stack.enter_context(patch.object(target, name, stand_in))
        stack.enter_context(mode)
        yield stack.enter_context(FakeRank(mode))


@contextmanager
def same_random_state(self: object, name: str = "") -> Iterator[None]:
    """Stand in for Megatron's random streams: nothing random is drawn."""
    yield


def apply_to_fakes(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Stand in for torch's way to convert a module, which swaps parameters; fake ones cannot be swapped."""
    for module in self.modules():
        for parameter in module.parameters(recurse=False):
            converted = fn(parameter)
            if converted.dtype != parameter.dtype:
                parameter.data = converted.detach()
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = fn(buffer)
    return self


def tensor_of_values(make: Callable[..., Tensor], data: Any, **settings: Any) -> Tensor:
    """Stand in for torch.tensor, which reads tensors in a list past the dispatcher."""
    if isinstance(data, list):
        data = tree_map(lambda leaf: leaf.item() if isinstance(leaf, Tensor) else leaf, data)
    return make(data, **settings)


def own_object_of_all(items: list[Any], item: Any, group: dist.ProcessGroup | None = None) -> None:
    """Stand in for a gathering of objects: all ranks have this one's."""
    items[:] = [item] * len(items)
