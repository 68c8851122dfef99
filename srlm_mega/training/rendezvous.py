"""The rendezvous of the ranks, before there are groups or a watchdog; it names ranks that do not arrive."""

import faulthandler
import socket
import sys
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import DistError, Store

from srlm_mega.errors import StageCrashed


def rendezvous(seconds: float) -> tuple[Store, int, int]:
    """Return the store, this process's rank and the number of processes, as torchrun (or srun) set them. StageCrashed,
    after the stacks of this process, when not all of them are at the store within `seconds`."""
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
    store.set(key(rank), socket.gethostname())
    wait_for_all(store, size, seconds)
    return store, rank, size


def wait_for_all(store: Store, size: int, seconds: float) -> None:
    """Wait until every rank has stored its host. StageCrashed, which names those that have not, after `seconds`."""
    try:
        store.wait([key(rank) for rank in range(size)], timedelta(seconds=seconds))
    except DistError:
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        known = [rank for rank in range(size) if store.check([key(rank)])]
        absent = ", ".join(f"rank {rank}" for rank in range(size) if rank not in known)
        there = ", ".join(f"rank {rank} on {store.get(key(rank)).decode()}" for rank in known)
        raise StageCrashed(
            f"ranks did not start in {seconds / 60:g} min. Did not arrive: {absent}. Arrived: {there}"
        ) from None


def key(rank: int) -> str:
    """Return the store's key of a rank's host."""
    return f"rendezvous/{rank}"
