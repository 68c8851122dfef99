"""Where a training step's time goes: exclusive seconds per part, measured by wrapping functions from outside.

Forward and backward interleave in the pipeline schedule, so Megatron's own step functions are timed, and every call of
torch.distributed from anywhere. A part inside another one is taken out of it: the all-reduces of tensor parallelism
count as communication, not as forward. Communication contains waiting for other ranks, and so the pipeline's bubble.
On a GPU the device is synchronised around every part, which removes all overlap: the parts then add up to more than an
undisturbed step. The GPU's side has not run yet.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules

from srlm_mega.training import trainer

Part = Literal["data", "forward", "backward", "optimizer", "communication", "other"]
PARTS: dict[Part, str] = {
    "data": "token ids to tensors on the device",
    "forward": "the model and its loss",
    "backward": "gradients; with recompute the second forward too",
    "optimizer": "gradient norm, clipping, update",
    "communication": "inside torch.distributed, which includes waiting for other ranks (the pipeline's bubble)",
    "other": "the rest: the schedule's own Python, metrics",
}
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor",
    "broadcast", "barrier", "isend", "irecv", "batch_isend_irecv",
)  # fmt: skip


@dataclass
class TimeSplit:
    """A stopwatch that is always in exactly one part."""

    device: torch.device
    seconds: dict[Part, float] = field(default_factory=lambda: defaultdict(float))
    _stack: list[Part] = field(default_factory=lambda: ["other"])
    _since: float = field(default_factory=time.perf_counter)

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Charge a block, or each call of a decorated function, to `name`, apart from parts inside it."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def start(self) -> None:
        """Begin to measure; earlier seconds are dropped."""
        self._charge()
        self.seconds.clear()

    def stop(self) -> dict[Part, float]:
        """Return the seconds of every part since `start`."""
        self._charge()
        return {part: self.seconds[part] for part in PARTS}

    def _charge(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextmanager
    def wrapped(self) -> Iterator[None]:
        """Time the parts of training steps inside the block; `data` is the caller's to mark."""
        with ExitStack() as stack:

            def wrap(holder: Any, attribute: str, part: Part) -> None:
                function = getattr(holder, attribute)
                stack.enter_context(patch.object(holder, attribute, self.part(part)(function)))

            wrap(schedules, "forward_step", "forward")
            wrap(schedules, "backward_step", "backward")
            wrap(trainer, "update", "optimizer")
            wrap(dist.Work, "wait", "communication")
            collectives = {name: getattr(dist, name) for name in COLLECTIVES}
            timed = {function: self.part("communication")(function) for function in collectives.values()}
            for module in communicating_modules():
                for attribute, value in list(vars(module).items()):
                    if callable(value) and any(value is function for function in collectives.values()):
                        stack.enter_context(patch.object(module, attribute, timed[value]))
            yield


def communicating_modules() -> list[Any]:
    """Return torch.distributed and Megatron's loaded modules, some of which keep collectives under their own names."""
    names = [name for name in sys.modules if name.startswith(("torch.distributed", "megatron.core"))]
    return [sys.modules[name] for name in names if isinstance(sys.modules[name], type(sys))]
