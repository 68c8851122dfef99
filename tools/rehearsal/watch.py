"""What a step costs, seen at torch's dispatcher: bytes that are alive and what holds them, messages, host reads.

It watches real tensors and fake ones alike, and changes nothing of what it watches.
"""

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from srlm_mega.tools.rehearsal.rehearsal_record import HeldBytes, HostRead, Kind, MessageCount, PhaseMemory

OURS = ("/srlm_mega/", "/kernels/", "/megatron/")  # a line of these files is a place that a reader can act upon
HEAD = ("/kernels/logprob.py", "/kernels/reference.py", "/kernels/dpo_kernel.py")
NOT_THESE = ("/tools/rehearsal/", "/site-packages/torch/")
# Operations that let the host wait for values of a tensor.
HOST_READS = frozenset(
    ("aten._local_scalar_dense", "aten.equal", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten._unique2",
     "aten.unique_dim", "aten.repeat_interleave.Tensor")
)  # fmt: skip


DEVICE_OF, CPU = torch.ops.prim.device.default, torch.device("cpu")  # every second operation on fake tensors
name_of = cache(str)  # of an operation, with its overload: aten.index.Tensor


@dataclass
class StorageUse:
    """A storage: its bytes, and what they are for."""

    size: int
    kind: Kind
    where: str


@dataclass(frozen=True)
class Mark:
    """The start of a phase, as a number of events."""

    phase: str
    event: int


class StepWatch(TorchDispatchMode):
    """Counts what operations do in its block. `axis` names a process group for people."""

    def __init__(self, axis: Callable[[dist.ProcessGroup], str]) -> None:
        super().__init__()
        self._axis = axis
        self._alive: dict[int, StorageUse] = {}  # by storage
        self._events: list[tuple[StorageUse, int]] = []  # +1: made, -1: freed
        self._marks: list[Mark] = []
        self._made: Kind = "activations"
        self._on_host = weakref.WeakSet[torch.UntypedStorage]()
        self._messages: dict[tuple[str, str, str], float] = defaultdict(float)
        self._message_bytes: dict[tuple[str, str, str], float] = defaultdict(float)
        self._reads: dict[tuple[str, str], float] = defaultdict(float)
        self._times = 1.0

    @contextmanager
    def phase(self, name: str, made: Kind = "activations", times: float = 1.0) -> Iterator[None]:
        """Name what happens in the block, and what is made in it. Messages and reads stand for `times` as many, those
        of data parallelism and those after `ends_repetition` for themselves."""
        self._marks.append(Mark(name, len(self._events)))
        self._made, self._times = made, times
        yield
        self._marks.append(Mark("", len(self._events)))

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count it."""
        if func is DEVICE_OF:
            return CPU
        name = name_of(func)
        if name.startswith("c10d."):
            self._count_message(name.split(".")[1], args)
        elif reads_values(name, args):
            self.count_read(args[0])
        result = func(*args, **(kwargs or {}))
        on_host = bool(self._on_host) and self._all_on_host(args)
        for tensor in tensors_in((result,)):
            self._count_storage(tensor.untyped_storage())
            if on_host:
                self.put_on_host(tensor)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard costs as much as the rest

    def ends_repetition(self) -> None:
        """What follows in this phase is done once."""
        self._times = 1.0

    def named(self, tensors: Sequence[Tensor], kind: Kind) -> None:
        """Say what these tensors are."""
        for tensor in tensors:
            allocation = self._alive.get(tensor.untyped_storage()._cdata)
            if allocation is not None:
                allocation.kind = kind

    def put_on_host(self, tensor: Tensor) -> None:
        """Take a tensor for one in the host's memory, whose values are read without waiting."""
        self._on_host.add(tensor.untyped_storage())
        self.named([tensor], "host")

    def is_on_host(self, tensor: Tensor) -> bool:
        """Tell whether a tensor was put on the host, or made of such ones."""
        return tensor.untyped_storage() in self._on_host

    def count_read(self, tensor: Tensor | None) -> None:
        """The host waits for a tensor's values."""
        if tensor is None or not self.is_on_host(tensor):
            self._reads[self._phase, place()] += self._times

    def alive(self, kind: Kind) -> int:
        """Return the bytes of a kind that are alive."""
        return sum(storage.size for storage in self._alive.values() if storage.kind == kind)

    @property
    def peak(self) -> int:
        """The most bytes that were alive."""
        return max(self._levels(), default=0)

    @property
    def host_peak(self) -> int:
        """The most bytes that were alive on the host."""
        return max(accumulate(sign * each.size for each, sign in self._events if each.kind == "host"), default=0)

    def phases(self) -> list[PhaseMemory]:
        """Return the most bytes that were alive in each phase."""
        levels = [0, *self._levels()]
        found = []
        for start, end in zip(self._marks, self._marks[1:], strict=False):
            if start.phase:
                found.append(PhaseMemory(start.phase, max(levels[start.event : end.event + 1]), levels[end.event]))
        return found

    def holders(self) -> list[HeldBytes]:
        """Return what was alive at the peak, the largest first."""
        levels = list(self._levels())
        until = levels.index(max(levels)) + 1 if levels else 0
        held: Counter[tuple[Kind, str]] = Counter()
        for allocation, sign in self._events[:until]:
            if allocation.kind == "host":
                continue
            held[allocation.kind, allocation.where] += sign * allocation.size
        return [HeldBytes(*key, size) for key, size in held.most_common() if size > 0]

    def messages(self) -> list[MessageCount]:
        """Return the messages of every phase and group."""
        return [
            MessageCount(*key, round(count), round(self._message_bytes[key]))
            for key, count in sorted(self._messages.items())
        ]

    def host_reads(self) -> list[HostRead]:
        """Return the lines at which the host waits for the device, the most frequent first."""
        return [HostRead(*key, round(count)) for key, count in sorted(self._reads.items(), key=lambda item: -item[1])]

    def _all_on_host(self, args: Sequence[Any]) -> bool:
        tensors = tensors_in(args)
        return bool(tensors) and all(map(self.is_on_host, tensors))

    @property
    def _phase(self) -> str:
        return self._marks[-1].phase if self._marks else ""

    def _levels(self) -> Iterator[int]:
        """Bytes alive on the device after every event."""
        return accumulate(sign * (each.kind != "host") * each.size for each, sign in self._events)

    def _count_storage(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive or storage.nbytes() == 0:
            return
        where = place()
        allocation = self._alive[key] = StorageUse(storage.nbytes(), self._kind(where), where)
        self._events.append((allocation, 1))
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        allocation = self._alive.pop(key)
        self._events.append((allocation, -1))

    def _kind(self, where: str) -> Kind:
        if self._made != "activations":
            return self._made
        if "kernels/" in where and in_head(sys._getframe()):  # context parallelism uses its collectives too
            return "head"
        return "activations" if torch._C._current_graph_task_id() == -1 else "temporaries"

    def _count_message(self, operation: str, args: Sequence[Any]) -> None:
        (boxed,) = (arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        group = dist.ProcessGroup.unbox(boxed)
        if group.size() == 1:
            return
        key = self._phase, self._axis(group), operation.rstrip("_")
        times = 1.0 if "DP" in key[1] else self._times
        self._messages[key] += times
        self._message_bytes[key] += times * max((bytes_of(arg) for arg in args), default=0)


def bytes_of(argument: Any) -> int:
    """Return the bytes of the tensors in an argument."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in((argument,)))


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among an operation's arguments or results, which may be in lists, or lists of lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


def reads_values(name: str, args: Sequence[Any]) -> bool:
    """Tell whether the host needs values of a tensor for an operation, or before it can go on after it."""
    return name.rpartition(".")[0] in HOST_READS or name in HOST_READS or picks_by_mask(name, args)


def picks_by_mask(name: str, args: Sequence[Any]) -> bool:
    """Tell whether an operation indexes by a mask, whose number of elements the host must know; one value for all of
    them is filled in without that."""
    if not name.startswith("aten.index") or not isinstance(args[1], list | tuple):
        return False
    masked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return masked and (name == "aten.index.Tensor" or args[2].numel() > 1)


def place() -> str:
    """Return the line of ours or Megatron's that runs; in a backward pass also the operation it is of."""
    node = torch._C._current_autograd_node() if torch._C._current_graph_task_id() != -1 else None
    line = line_of(sys._getframe(1))
    return line if node is None else f"{line}, backward of {node.name().removesuffix('Backward0')}"


def line_of(frame: FrameType | None) -> str:
    """Return the innermost line of ours or Megatron's, without what leads to the package."""
    while frame is not None:
        path = frame.f_code.co_filename
        if is_ours(path):
            return f"{short(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def in_head(frame: FrameType | None) -> bool:
    """Tell whether the head's own files are on the stack."""
    while frame is not None and not frame.f_code.co_filename.endswith(HEAD):
        frame = frame.f_back
    return frame is not None


@cache
def is_ours(path: str) -> bool:
    """Tell whether a file is of the program that is watched."""
    return any(part in path for part in OURS) and not any(part in path for part in NOT_THESE)


def short(path: str) -> str:
    """Return a file's path from its package on, its name where it is in none."""
    for part in ("/site-packages/", "/srlm_mega/"):
        if part in path:
            return path.rpartition(part)[2]
    return path.rpartition("/")[2]
