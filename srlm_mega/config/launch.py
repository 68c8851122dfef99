"""How a run's processes are started: torchrun on this node, or steps of a Slurm allocation."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from srlm_mega.config.preflight import PreflightConfig
from srlm_mega.config.section import Section


class SlurmConfig(Section, decides="layout"):
    """What `srlm launch slurm` writes into a job, and how the job's steps start."""

    partition: str | None = Field(None, description="Partition of the job; null: the cluster's default.")
    account: str | None = Field(None, description="Account that the job is charged to; null: the cluster's default.")
    time: str | None = Field(None, description='Wall-clock limit, for example "24:00:00" (quoted); none: the default.')
    sbatch_options: tuple[str, ...] = Field((), description="Further lines, for example --qos=high.")
    gpu_option: Literal["gpus-per-node", "gres"] = Field("gpus-per-node", description="How GPUs are asked for here.")
    signal_seconds: int = Field(
        300, ge=1, le=65535, description="Warning before the time limit: time for a checkpoint."
    )
    max_restarts: int = Field(20, ge=0, description="A job that was requeued so often ends.")
    python: Path | None = Field(None, description="Python on the nodes, with srlm beside it; none: this one.")
    modules: tuple[str, ...] = Field((), description="Environment modules the job loads.")
    environment: dict[str, str] = Field(
        {}, description="Further variables, for example NCCL_IB_HCA; no secrets: the run keeps it."
    )
    network_interface: str | None = Field(None, description="For NCCL's and gloo's sockets, for example ib0.")
    container: str | None = Field(None, description="Image (pyxis) for what needs torch; srlm run stays outside.")
    mounts: tuple[Path, ...] = Field((), description="Folders the container sees besides the working directory.")


class LaunchConfig(Section, decides="layout"):
    """How training stages start."""

    nodes: int = Field(1, ge=1, description="Nodes of a training stage.")
    processes_per_node: int = Field(1, ge=1, description="Ranks per node of a training stage: one per GPU.")
    threads_per_process: int = Field(1, ge=1, description="OMP_NUM_THREADS of a stage's processes.")
    launcher: Literal["torchrun", "slurm"] = Field(
        "torchrun", description="torchrun: on this node; slurm: as steps of the allocation that srlm run is in."
    )
    rendezvous: Literal["static", "c10d"] = Field("static", description="How ranks on several nodes meet.")
    slurm: SlurmConfig = SlurmConfig()
    preflight: PreflightConfig = PreflightConfig()
