"""Processes of a run: torchrun on this node, or steps of a Slurm allocation; the preflight before a job."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from srlm_mega.config.secrets_in_values import check_option, check_variable
from srlm_mega.config.section import Section

ContainerRuntime = Literal["pyxis", "apptainer", "singularity"]
INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")  # Linux holds 15 letters


class SlurmConfig(Section, decides="layout"):
    """Contents of the job that `srlm launch slurm` writes, and the start of its steps."""

    partition: str | None = Field(None, description="Partition of the job; null: the cluster's default.")
    account: str | None = Field(None, description="Account that the job is charged to; null: the cluster's default.")
    time: str | None = Field(
        None, description="Wall-clock limit as sbatch takes it, for example 24:00:00, or minutes; null: the default."
    )
    qos: str | None = Field(None, description="Quality of service of the job; null: the cluster's default.")
    constraint: str | None = Field(None, description="Features that the job's nodes must have, for example h100.")
    reservation: str | None = Field(None, description="Reservation in which the job runs.")
    exclusive: bool = Field(
        True, description="Whole nodes, with all memory; false: only the GPUs and cores (cores_per_node) asked for."
    )
    sbatch_options: tuple[str, ...] = Field((), description="Further options of sbatch, for example --mail-type=END.")
    gpu_option: Literal["gpus-per-node", "gres"] = Field("gpus-per-node", description="Option that asks for GPUs.")
    gpu_type: str | None = Field(
        None, pattern=r"^[^:,\s]+$", description="Type of GPU that the job asks for, as sinfo names it; null: any."
    )
    signal_seconds: int = Field(
        300, ge=1, le=65535, description="Seconds of warning before the time limit: time for a checkpoint."
    )
    max_restarts: int = Field(20, ge=0, description="Largest number of times that a job is requeued.")
    python: Path | None = Field(None, description="Python on the nodes, with srlm next to it; null: this one.")
    modules: tuple[str, ...] = Field((), description="Environment modules that the job loads.")
    environment: dict[str, str] = Field(
        {}, description="Further variables of the environment, such as NCCL_IB_HCA; no secrets: the run keeps them."
    )
    network_interface: str | tuple[str, ...] | None = Field(
        None,
        description="Full name of the interface of NCCL's and gloo's sockets, for example ib0; of several names, each "
        "node takes the first that it has.",
    )
    secrets_file: Path | None = Field(
        None,
        description="File of lines NAME=value, such as WANDB_API_KEY=..., mode 0600 and outside of the run: the job "
        "exports them, and copies nothing.",
    )
    container: str | None = Field(None, description="Image for stages; srlm run itself stays outside.")
    container_runtime: ContainerRuntime = Field(
        "pyxis",
        description="Program that runs containers, the sampler's too: pyxis (without Slurm docker), or apptainer or "
        "singularity.",
    )
    mounts: tuple[Path, ...] = Field((), description="Folders that the container sees besides the working directory.")

    @property
    def interfaces(self) -> tuple[str, ...]:
        """Names of network_interface; a node takes the first that it has."""
        names = self.network_interface or ()
        return (names,) if isinstance(names, str) else names

    @field_validator("time", mode="before")
    @classmethod
    def _minutes(cls, time: object) -> object:
        """A bare number, as YAML has it, is one of minutes, as with sbatch."""
        return str(time) if type(time) is int else time

    @field_validator("network_interface")
    @classmethod
    def _full_names(cls, names: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for name in (names,) if isinstance(names, str) else names or ():
            if INTERFACE.fullmatch(name) is None:
                raise ValueError(
                    f"{name!r} is no full name of a network interface, such as ib0, and gloo takes nothing else. "
                    "Several names are a list, [ib0, ens5]; NCCL's patterns (^docker0,lo or =ib0) belong to "
                    "launch.slurm.environment, as NCCL_SOCKET_IFNAME"
                )
        return names

    @field_validator("environment")
    @classmethod
    def _without_secrets(cls, environment: dict[str, str]) -> dict[str, str]:
        for name, value in environment.items():
            check_variable(name, value)
        return environment

    @field_validator("sbatch_options")
    @classmethod
    def _setting_no_secrets(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            check_option(option)
        return options


class PreflightConfig(Section, decides="layout"):
    """Limits of the check of all nodes before a job; the waits together should stay under a minute."""

    check_seconds: float = Field(10.0, gt=0, description="Longest time of one check on one node, in seconds.")
    report_seconds: float = Field(15.0, gt=0, description="Longest wait of node 0 for all reports, in seconds.")
    allreduce_seconds: float = Field(
        35.0, gt=0, description="Longest time of the all-reduces, from the start of ranks, in seconds."
    )
    allreduce_mib: int = Field(16, ge=1, description="Size of each rank's part of an all-reduce, in MiB.")
    floor_within_node: float = Field(
        0.01, ge=0, description="Lowest bus bandwidth (as in nccl-tests) within a node, in GB/s."
    )
    floor_between_nodes: float = Field(
        0.01,
        ge=0,
        description="Lowest bus bandwidth between nodes, in GB/s. Set both to half of what a sound cluster gave.",
    )
    max_clock_skew_seconds: float = Field(5.0, gt=0, description="Largest difference of nodes' clocks, in seconds.")


class LaunchConfig(Section, decides="layout"):
    """Nodes, processes and launcher of training stages."""

    nodes: int = Field(1, ge=1, description="Number of nodes of a training stage.")
    processes_per_node: int = Field(1, ge=1, description="Ranks per node of a training stage: one per GPU.")
    threads_per_process: int | None = Field(
        None,
        ge=1,
        description="CPU threads (OMP_NUM_THREADS) of each process of a stage, but not of samplers on GPUs; null: "
        "cores_per_node divided by the processes that run at once on a node.",
    )
    cores_per_node: int | None = Field(
        None,
        ge=1,
        description="CPU cores that the processes of a stage share on a node; null: those that srlm run may use when "
        "the run begins, which keeps the number.",
    )
    launcher: Literal["torchrun", "slurm"] = Field(
        "torchrun", description="Start on this node (torchrun), or as steps of srlm run's Slurm allocation (slurm)."
    )
    rendezvous: Literal["static", "c10d"] = Field("static", description="Rendezvous of ranks on several nodes.")
    port_range: tuple[int, int] = Field(
        (10_000, 29_999),
        description="First and last port of node 0 that a job's nodes may call; which of them follows from the job's "
        "number, and one that is taken is passed by. For sites with a firewall between nodes.",
    )
    slurm: SlurmConfig = SlurmConfig()
    preflight: PreflightConfig = PreflightConfig()

    @field_validator("port_range")
    @classmethod
    def _two_ports(cls, ports: tuple[int, int]) -> tuple[int, int]:
        """The preflight needs one for its calls and one for its ranks."""
        if not 1024 <= ports[0] < ports[1] <= 65535:
            raise ValueError("give the first and the last of at least two ports between 1024 and 65535")
        return ports

    def threads(self, processes: int) -> int:
        """Return the number of CPU threads of each process, where so many run at once on a node."""
        return self.threads_per_process or max(1, (self.cores_per_node or 1) // processes)
