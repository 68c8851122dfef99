"""The device's name, and the peak memory of every pipeline stage. The branches for CUDA have never been run."""

import resource

import torch

from srlm_mega.config.model_sizes import GIB
from srlm_mega.training.topology import Topology


def device_name(device: torch.device) -> str | None:
    """Return a GPU's name as its driver gives it, None for a CPU."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def own_peak_bytes(device: torch.device) -> int:
    """Return the peak so far, in bytes: memory allocated by PyTorch on a GPU; on a CPU the process's resident memory,
    Python and its libraries included."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def peak_memory(topology: Topology) -> dict[str, float]:
    """Return metrics of the peak memory of each pipeline stage, in GiB: the maximum over its ranks. All ranks call it:
    it sums one float per stage and rank."""
    what = "max_allocated" if topology.device.type == "cuda" else "peak_rss"
    table = torch.zeros(topology.pp_size, topology.world_size, dtype=torch.float64)
    table[topology.pp_rank, topology.rank] = own_peak_bytes(topology.device) / GIB
    peaks = topology.sum_over_world(table).amax(dim=1).tolist()
    return {f"memory/stage_{stage}_{what}_GiB": peak for stage, peak in enumerate(peaks)}
