"""The CPU cores that a run's processes share: those of the machine where it begins, kept when it resumes elsewhere."""

import os
import socket
from pathlib import Path

from srlm_mega.config import Config
from srlm_mega.config.compatibility import print_once
from srlm_mega.config.file import read_yaml
from srlm_mega.launch.ranks import number_in
from srlm_mega.run.run_dir import RunDir

QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores(quota: Path = QUOTA) -> int:
    """Return the number of cores that this process may use: by its affinity, a Slurm job's share of the node, and a
    container's quota of CPU time (`quota`: microseconds and the period that they are for)."""
    cores = len(os.sched_getaffinity(0))
    cores = min(cores, number_in(os.environ, "SLURM_CPUS_ON_NODE", default=cores))
    allowed, _, period = quota.read_text().partition(" ") if quota.is_file() else ("max", "", "")
    return cores if allowed == "max" else max(1, min(cores, int(allowed) // int(period)))


def with_cores(config: Config, run: RunDir) -> Config:
    """Return the configuration with a number of cores per node, unless it says threads or cores itself: what the run
    began with, so that what is sampled on CPUs has the same bytes, else the cores of this machine. Print it when the
    two differ."""
    launch, here = config.launch, usable_cores()
    if launch.threads_per_process is not None or launch.cores_per_node is not None:
        return config
    begun = read_yaml(run.config_file).get("launch", {}) if run.config_file.is_file() else {}
    kept = {key: begun[key] for key in ("threads_per_process", "cores_per_node") if begun.get(key) is not None}
    if kept.get("cores_per_node", here) != here:
        print_once(
            f"{run.root} was begun with {kept['cores_per_node']} cores per node and keeps them, for the same bytes: "
            f"{socket.gethostname()} has {here}. launch.cores_per_node={here} uses them in a run of its own"
        )
    return config.model_copy(update={"launch": launch.model_copy(update=kept or {"cores_per_node": here})})
