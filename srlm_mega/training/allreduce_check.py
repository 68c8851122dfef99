"""A timed all-reduce in every group of the layout, with the ranks of a job before it starts. On every node:
`torchrun ... -m srlm_mega.training.allreduce_check FOLDER CONFIG [section.key=value ...]`.

Each rank writes the place it has reached to FOLDER/rank_N, so that a node can say which of its ranks the others wait
for; rank 0 writes FOLDER/groups.json. On CUDA this has not been run.
"""

import faulthandler
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import orjson
import torch
import torch.distributed as dist

from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.launch.child_process import adapt_to_node, die_with_parent
from srlm_mega.launch.preflight.allreduce import END, GroupSpeed
from srlm_mega.run.files import write_atomic
from srlm_mega.training.topology import Topology, barrier, started_as

REPETITIONS = 3


def main(arguments: Sequence[str]) -> None:
    """Run one rank."""
    die_with_parent()
    adapt_to_node(os.environ)
    folder, config = Path(arguments[0]), load_config(Path(arguments[1]), arguments[2:])
    seconds = config.launch.preflight.allreduce_seconds
    faulthandler.dump_traceback_later(0.9 * seconds)  # into the node's log, before the node ends this process
    places = Places(folder / f"rank_{started_as()}")
    try:
        measure(config, folder, places)
    except Exception as error:
        places.failed(error)
        raise
    faulthandler.cancel_dump_traceback_later()


class Places:
    """The file in which a rank records how far it is."""

    def __init__(self, file: Path) -> None:
        self._file, self._count, self._name = file, 0, ""

    def at(self, name: str) -> None:
        """Record that this rank has reached `name`. All ranks pass the same places."""
        self._count, self._name = self._count + 1, name
        write_atomic(self._file, f"{self._count} {name}".encode())

    def failed(self, error: Exception) -> None:
        """Record the last place, and the error that happened there."""
        said = str(error).splitlines() or [""]
        write_atomic(self._file, f"{self._count} {self._name}\n{type(error).__name__}: {said[0]}".encode())


def measure(config: Config, folder: Path, places: Places) -> None:
    """Join the other ranks, then time one axis after the other, all groups of an axis at once, as in training."""
    minutes = config.launch.preflight.allreduce_seconds / 60
    limits = {f"{phase}_timeout_minutes": minutes for phase in ("start", "step", "checkpoint", "export")}
    places.at("the rendezvous of the ranks")
    with Topology.start(config.parallel, config.trainer.model_copy(update=limits), config.run.seed) as topology:
        speeds: list[GroupSpeed] = []
        for axis, group in topology.groups().items():
            places.at(f"the all-reduce of {axis}")
            ranks = tuple(dist.get_process_group_ranks(group))
            speed = bus_bandwidth(group, len(ranks), config.launch.preflight.allreduce_mib << 20, topology.device)
            slowest: dict[tuple[int, ...], float] = {}
            for others, gbytes in topology.all_gather((ranks, speed)):
                slowest[others] = min(gbytes, slowest.get(others, gbytes))
            speeds += [GroupSpeed(axis, others, gbytes) for others, gbytes in sorted(slowest.items())]
        places.at(END)
        if topology.is_main:
            write_atomic(folder / "groups.json", orjson.dumps([asdict(speed) for speed in speeds]))


def bus_bandwidth(group: dist.ProcessGroup, size: int, num_bytes: int, device: torch.device) -> float:
    """Return GB/s of all-reduces of this many bytes, as nccl-tests counts them: 2 (k - 1) / k * bytes / seconds. The
    best of a few: other traffic on the network for a moment does not make a node a bad one."""
    buffer = torch.zeros(num_bytes // 4, device=device)
    seconds: list[float] = []
    for _ in range(1 + REPETITIONS):
        barrier(device, group)
        synchronize(device)
        begin = time.perf_counter()
        dist.all_reduce(buffer, group=group)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * (size - 1) / size * num_bytes / min(seconds[1:]) / 1e9  # the first one connects, and does not count


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(sys.argv[1:])
