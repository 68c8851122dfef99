"""Ranks, groups and devices: the only place that reads RANK and touches Megatron's parallel state.

One `Topology` is started per stage and passed to the functions that need it. The device is the CPU (gloo) or CUDA
(NCCL). The code is the same for both, but nothing here has been run on a GPU.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal, TypeVar, assert_never, cast

import megatron.core
import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from srlm_mega.config.training import ParallelConfig, TrainerConfig
from srlm_mega.errors import UserError
from srlm_mega.training import cpu_backend
from srlm_mega.training.fp8_recipe import length_multiple
from srlm_mega.training.heartbeat import Heartbeat, Phase
from srlm_mega.training.megatron_version import megatron_version
from srlm_mega.training.rendezvous import rendezvous

T = TypeVar("T")


@dataclass(frozen=True)
class Topology:
    """This process's ranks among the others: tensor x pipeline x context x data parallel."""

    rank: int
    world_size: int
    device: torch.device
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    parallel: ParallelConfig
    cp_rank: int = 0
    cp_size: int = 1
    length_multiple: int = 1  # the input positions of a forward pass are a multiple of it, for FP8
    # Processes over gloo: objects (whole models among them) go through RAM, not through NCCL's device buffers.
    cpu_group: dist.ProcessGroup | None = None
    heartbeat: Heartbeat | None = None

    @classmethod
    @contextmanager
    def start(cls, parallel: ParallelConfig, trainer: TrainerConfig, seed: int) -> Iterator["Topology"]:
        """Join the other processes, split them into Megatron's groups and seed the random streams.

        The groups are destroyed at the end of the block, so one launch can run several layouts after another (inside
        one `process_group`). UserError when TP * PP * CP * DP is not the world size.
        """
        with process_group(trainer) as device:
            check_world_size(parallel, dist.get_world_size())
            parallel_state.initialize_model_parallel(
                parallel.tensor_model_parallel_size,
                parallel.pipeline_model_parallel_size,
                parallel.virtual_pipeline_model_parallel_size,
                context_parallel_size=parallel.context_parallel_size,
                create_gloo_process_groups=False,
            )
            try:
                topology = cls(
                    rank=dist.get_rank(),
                    world_size=dist.get_world_size(),
                    device=device,
                    tp_rank=parallel_state.get_tensor_model_parallel_rank(),
                    tp_size=parallel.tensor_model_parallel_size,
                    pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
                    pp_size=parallel.pipeline_model_parallel_size,
                    cp_rank=parallel_state.get_context_parallel_rank(),
                    cp_size=parallel.context_parallel_size,
                    dp_rank=parallel_state.get_data_parallel_rank(),
                    dp_size=parallel_state.get_data_parallel_world_size(),
                    parallel=parallel,
                    length_multiple=length_multiple(trainer, parallel),
                    cpu_group=None if device.type == "cpu" else dist.new_group(backend="gloo"),
                )
                topology.seed_dropout(seed)
                yield topology
            finally:
                parallel_state.destroy_model_parallel()

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0

    @property
    def is_reporter(self) -> bool:
        """True where this process's losses count: on the last pipeline stage, once per replica of the model."""
        return self.pp_rank == self.pp_size - 1 and self.tp_rank == 0 and self.cp_rank == 0

    @property
    def memory_bytes(self) -> int:
        """Bytes that this process can use: its device's memory, or its share of this machine's free RAM."""
        if self.device.type == "cuda":
            total: int = torch.cuda.get_device_properties(self.device).total_memory
            return total
        available: int = psutil.virtual_memory().available
        return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def seed_dropout(self, seed: int) -> None:
        """Seed the random streams: different per pipeline stage, data- and context-parallel rank; Megatron makes them
        differ per tensor rank."""
        own_seed = seed + 100 * self.pp_rank + 10_000 * self.dp_rank + 10_000_000 * self.cp_rank
        torch.manual_seed(own_seed)
        model_parallel_cuda_manual_seed(own_seed, force_reset_rng=True)

    def sum_over_world(self, values: torch.Tensor) -> torch.Tensor:
        """Return `values` (any shape, the same on every rank) summed over all processes, on the CPU."""
        summed = values.to(self.device).contiguous()  # all_reduce adds memory, whatever its strides
        dist.all_reduce(summed)
        return summed.cpu()

    def max_over_world(self, value: float) -> float:
        """Return the largest value of all processes; NaN when one has a NaN."""
        values = self.all_gather(value)
        return math.nan if any(map(math.isnan, values)) else max(values)

    def gather_model(self, shard: T) -> Sequence[T]:
        """Return the shards of one replica of the model on rank 0; nothing elsewhere."""
        own = shard if self.dp_rank == 0 and self.cp_rank == 0 else None
        shards: list[T | None] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(own, shards, dst=0, group=self.cpu_group)
        return [] if shards is None else [item for item in shards if item is not None]

    def all_gather(self, item: T) -> list[T]:
        """Return the item of every process (any that pickles), in the order of ranks, on all of them."""
        items: list[T | None] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.cpu_group)
        return cast(list[T], items)

    def any(self, here: bool) -> bool:
        """Tell whether it is true on any process: the same answer on all of them."""
        return bool(self.sum_over_world(torch.tensor([int(here)])))

    def groups(self) -> dict[str, dist.ProcessGroup]:
        """Return this process's group of each axis by the axis's name; axes of one process are left out."""
        found = {
            "TP": parallel_state.get_tensor_model_parallel_group(),
            "PP": parallel_state.get_pipeline_model_parallel_group(),
            "CP": parallel_state.get_context_parallel_group(),
            "DP": parallel_state.get_data_parallel_group(),
        }
        return {axis: group for axis, group in found.items() if dist.get_world_size(group) > 1}

    def beat(self, phase: Phase, place: str) -> None:
        """Record in the watchdog, where there is one, how far this process is. All processes pass the same places."""
        if self.heartbeat is not None:
            self.heartbeat.beat(phase, place)

    def barrier(self) -> None:
        """Wait for all processes."""
        barrier(self.device)


def barrier(device: torch.device, group: dist.ProcessGroup | None = None) -> None:
    """Wait for all processes of a group (None: all). NCCL would guess this one's device; gloo takes none."""
    dist.barrier(group, device_ids=None if device.type == "cpu" else [device.index])


@contextmanager
def watched(topology: Topology, trainer: TrainerConfig, stuck: Callable[[str], None]) -> Iterator[Topology]:
    """Yield the topology with a watchdog; `stuck` is called, on one rank, with why it ends all processes."""
    axes = {"TP": topology.tp_rank, "PP": topology.pp_rank, "CP": topology.cp_rank, "DP": topology.dp_rank}
    place = f"rank {topology.rank} ({', '.join(f'{axis} {rank}' for axis, rank in axes.items())})"
    store = dist.distributed_c10d._get_default_store()
    heartbeat = Heartbeat(store, topology.rank, topology.all_gather(place), timeouts(trainer), stuck)
    try:
        yield replace(topology, heartbeat=heartbeat)
    finally:
        heartbeat.end()


def timeouts(trainer: TrainerConfig) -> dict[Phase, float]:
    """Return the seconds that each phase may take."""
    return {
        "start": 60 * trainer.start_timeout_minutes,
        "step": 60 * trainer.step_timeout_minutes,
        "checkpoint": 60 * trainer.checkpoint_timeout_minutes,
        "export": 60 * trainer.export_timeout_minutes,
    }


@contextmanager
def process_group(trainer: TrainerConfig) -> Iterator[torch.device]:
    """Join the processes that torchrun (or srun) started, or start a group of this one alone; yield its device.

    Inside another `process_group` it changes nothing.
    """
    megatron_version(megatron.core.__version__)
    device = choose_device(trainer.device)
    if device.type == "cpu":
        cpu_backend.apply()
    else:
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it may build a graph for every new length
    if dist.is_initialized():
        yield device
        return
    backend = "gloo" if device.type == "cpu" else "nccl"
    # Longer than the watchdog's, whose message says more.
    timeout = timedelta(seconds=2 * max(timeouts(trainer).values()))
    alone = (dist.HashStore(), 0, 1)
    store, rank, size = rendezvous(timeouts(trainer)["start"]) if "RANK" in os.environ else alone
    store.set_timeout(timeout)
    # Without a device_id NCCL connects a group when it is first used. With one it connects at once, and each of the
    # hundreds of groups of a large layout is then a split of all ranks.
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def started_as() -> int:
    """Return this process's rank before the rendezvous."""
    return int(os.environ.get("RANK", "0"))


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return the wanted device; `auto` is CUDA where there is one. UserError when CUDA is wanted and absent."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    match wanted:
        case "cpu":
            return cpu
        case "auto":
            return cuda if torch.cuda.is_available() else cpu
        case "cuda":
            if torch.cuda.is_available():
                return cuda
            raise UserError("trainer.device=cuda, but there is no CUDA device here: use trainer.device=cpu or auto")
        case _:
            assert_never(wanted)


def check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    """Raise UserError, with the arithmetic, unless TP * PP * CP * DP is the number of processes."""
    dp = parallel.data_parallel_size or max(1, world_size // parallel.model_parallel_size)
    if parallel.model_parallel_size * dp != world_size:
        raise UserError(
            f"{parallel.product(dp)}, but {world_size} processes were started: "
            "change the parallel section, or launch.nodes and launch.processes_per_node"
        )
