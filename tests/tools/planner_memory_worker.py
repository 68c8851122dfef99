"""Two DPO steps of the trainer in this process, and the most bytes that its tensors took: prints them."""

import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srlm_mega.config.file import load_config
from srlm_mega.tools.bench_training import Bench, TrainingRequest
from srlm_mega.training.topology import Topology, process_group


class PeakBytes(TorchDispatchMode):
    """Counts the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        """A storage once, for as long as it lives."""
        key = storage._cdata
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        """It is freed."""
        self.seen.discard(key)
        self.now -= size


def main() -> None:
    """CONFIG [overrides]."""
    config = load_config(Path(sys.argv[1]), sys.argv[2:])
    request = TrainingRequest("dpo", 1, 1, False, None, None)
    with (
        process_group(config.trainer),
        Topology.start(config.parallel, config.trainer, 0) as topology,
        PeakBytes() as peak,
    ):
        bench = Bench(config, request, topology)
        held = peak.now
        for number in range(2):
            bench._step(number)
        print("bytes", held, peak.now, peak.peak)


main()
