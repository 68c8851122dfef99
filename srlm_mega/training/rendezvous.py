"""The rendezvous of the ranks, before there are groups or a watchdog: ranks that do not arrive are named."""

import faulthandler
import socket
import sys
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import DistError, Store

from srlm_mega.errors import StageCrashed


def rendezvous(seconds: float) -> tuple[Store, int, int]:
    """The store, rank and number of processes that torchrun (or srun) gave. StageCrashed, after the stacks of this
    process, when not all of them are at the store within `seconds`."""
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
    store.set(key(rank), socket.gethostname())
    wait_for_all(store, size, seconds)
    return store, rank, size


def wait_for_all(store: Store, size: int, seconds: float) -> None:
    """Until every rank has said where it is."""
    try:
        store.wait([key(rank) for rank in range(size)], timedelta(seconds=seconds))
    except DistError:
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        known = [rank for rank in range(size) if store.check([key(rank)])]
        absent = ", ".join(f"rank {rank}" for rank in range(size) if rank not in known)
        there = ", ".join(f"rank {rank} on {store.get(key(rank)).decode()}" for rank in known)
        raise StageCrashed(
            f"the ranks did not meet in {seconds / 60:g} min. Did not arrive: {absent}. Arrived: {there}"
        ) from None


def key(rank: int) -> str:
    """Where a rank says on which host it is."""
    return f"rendezvous/{rank}"
