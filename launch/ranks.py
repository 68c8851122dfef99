"""How the ranks of a training stage start: by torchrun on this node, or as a step of the Slurm allocation that this
process is in, with torchrun on each of its nodes."""

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, assert_never

from srlm_mega.config import Config
from srlm_mega.config.launch import LaunchConfig
from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.run.run_dir import RunDir

# A node's task of a step. What it is given: a file that all nodes must see, torchrun and its arguments. USR1 (save)
# and USR2 (show stacks) are left to the ranks: they would end the agent. SLURM_NODEID is the node's own only here.
TASK = """\
trap "" USR1 USR2
if [ ! -e "$1" ]; then
  echo "node $(hostname) does not see $1: the run folder must be on a file system that all nodes share" >&2
  exit 2
fi
exec "$2" --node-rank="$SLURM_NODEID" "${@:3}"
"""


@dataclass(frozen=True)
class Start:
    """A command line, and the folder with what its nodes print, where that is not what it prints itself."""

    argv: list[str]
    logs: Path | None = None


@dataclass(frozen=True)
class Allocation:
    """A Slurm job's nodes, and how often it was requeued."""

    job: int
    attempt: int
    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Rendezvous:
    """Where ranks on several nodes meet: at a port of one node, the first with launch.rendezvous=static. With c10d the
    nodes decide among themselves who is first, and `id` keeps jobs apart."""

    host: str
    port: int
    id: str


@dataclass(frozen=True)
class JobStep:
    """How a step of a Slurm allocation starts: on these nodes, with a file per node in `logs`, in a container (pyxis)
    where one is given, which sees the working directory and `mounts`."""

    hosts: tuple[str, ...]
    logs: Path
    container: str | None
    mounts: tuple[Path, ...]


def start_ranks(config: Config, run: RunDir, name: str, arguments: Sequence[str], shared_file: Path) -> Start:
    """`srlm` with these arguments as all ranks, which must see `shared_file`; `name` is their log's. CannotContinue,
    with what to type on each node, when there are several nodes and no Slurm; UserError when this cannot be."""
    launch, bin_dir = config.launch, Path(sys.executable).parent
    match launch.launcher:
        case "torchrun":
            argv = [str(bin_dir / "srlm"), *arguments]
            if launch.nodes > 1:
                raise CannotContinue(by_hand(launch, name, argv))
            processes = f"--nproc-per-node={launch.processes_per_node}"
            return Start([str(bin_dir / "torchrun"), "--standalone", processes, "--no-python", *argv])
        case "slurm":
            allocation = allocation_for(launch.nodes)
            step = job_step(config, run, allocation, name)
            rendezvous = Rendezvous(step.hosts[0], port_of(allocation.job), f"{allocation.job}-{allocation.attempt}")
            programs = None if step.container is not None else bin_dir
            argv = [tool(programs, "srlm"), *arguments]
            return Start(ranks_in_step(programs, argv, launch, rendezvous, step, shared_file.absolute()), step.logs)
        case other:
            assert_never(other)


def start_one(config: Config, run: RunDir, name: str, arguments: Sequence[str], starts_steps: bool) -> Start:
    """`srlm` with these arguments as one process: in the container that training has, unless it starts steps itself."""
    if config.launch.launcher == "slurm" and config.launch.slurm.container is not None and not starts_steps:
        step = job_step(config, run, allocation_for(1), name)
        return Start(process_in_step(["srlm", *arguments], step), step.logs)
    return Start([str(Path(sys.executable).parent / "srlm"), *arguments])


def allocation_for(nodes: int) -> Allocation:
    """The allocation, with as many nodes as needed whose first one can be reached by its name. UserError otherwise."""
    allocation = current_allocation(os.environ)
    if len(allocation.hosts) < nodes:
        raise UserError(
            f"launch.nodes={nodes}, but job {allocation.job} has {len(allocation.hosts)}: "
            f"{', '.join(allocation.hosts)}. Ask for more (--nodes), or choose a layout for fewer"
        )
    if nodes > 1:
        check_resolves(allocation.hosts[0])
    return allocation


def current_allocation(variables: Mapping[str, str]) -> Allocation:
    """From Slurm's variables. UserError outside of an allocation."""
    job, nodes = variables.get("SLURM_JOB_ID"), variables.get("SLURM_JOB_NODELIST")
    if job is None or nodes is None:
        raise UserError(
            "launch.launcher=slurm, but this is not a Slurm allocation (no SLURM_JOB_ID): `srlm launch slurm CONFIG "
            "--submit` makes one, or give launch.launcher=torchrun on one node"
        )
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if listed.returncode:
        raise UserError(f"scontrol show hostnames {nodes}: {listed.stderr.strip()}")
    return Allocation(int(job), int(variables.get("SLURM_RESTART_COUNT", "0")), tuple(listed.stdout.split()))


def check_resolves(host: str) -> None:
    """UserError when a name has no address here."""
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        raise UserError(
            f"the host name {host} does not resolve on {socket.gethostname()} ({error.strerror}): ranks meet there, so "
            "every node needs its address, in DNS or in /etc/hosts"
        ) from None


def job_step(config: Config, run: RunDir, allocation: Allocation, name: str) -> JobStep:
    """A step on the allocation's first nodes; its logs are this attempt's."""
    slurm = config.launch.slurm
    return JobStep(
        hosts=allocation.hosts[: config.launch.nodes],
        logs=(run.jobs / str(allocation.job) / f"attempt_{allocation.attempt}" / name.replace("/", "-")).absolute(),
        container=slurm.container,
        mounts=(run.root, *slurm.mounts),
    )


def by_hand(launch: LaunchConfig, name: str, argv: Sequence[str]) -> str:
    """What to type on each node of a cluster without Slurm."""
    script = Path(__file__).with_name("torchrun_multinode.sh")
    options = [f"--nnodes={launch.nodes}", f"--nproc-per-node={launch.processes_per_node}"]
    options += ["--rendezvous=c10d"] if launch.rendezvous == "c10d" else []
    options += [f"--threads={launch.threads_per_process}"] if launch.threads_per_process > 1 else []
    lines = "\n".join(
        f"  {shlex.join([str(script), *options, f'--node-rank={rank}', '--master-addr=FIRST_NODE', *argv])}"
        for rank in range(launch.nodes)
    )
    return (
        f"{name} takes launch.nodes={launch.nodes}, and launch.launcher=torchrun starts processes on this node only. "
        "With Slurm: srlm launch slurm CONFIG. Without, start each line on its node, with the first one's name for "
        f"FIRST_NODE:\n{lines}\n`srlm run` then goes on behind what they made"
    )


def tool(bin_dir: Path | None, name: str) -> str:
    """A command beside the Python, or on a container's PATH."""
    return name if bin_dir is None else str(bin_dir / name)


def ranks_on_node(
    bin_dir: Path | None, argv: Sequence[str], launch: LaunchConfig, rendezvous: Rendezvous, node_rank: int
) -> list[str]:
    """Return the command line of this node's share of the ranks; every other node is given the same."""
    return [tool(bin_dir, "torchrun"), f"--node-rank={node_rank}", *agent(launch, rendezvous, argv)]


def ranks_in_step(
    bin_dir: Path | None,
    argv: Sequence[str],
    launch: LaunchConfig,
    rendezvous: Rendezvous,
    step: JobStep,
    shared_file: Path,
) -> list[str]:
    """A command as ranks on all nodes of a step: one task per node, and torchrun in each. A node that does not see
    `shared_file` says so. When a task fails, the others end."""
    task = ["bash", "-c", TASK, "task", str(shared_file), tool(bin_dir, "torchrun"), *agent(launch, rendezvous, argv)]
    return [*srun_step(step), "--kill-on-bad-exit=1", "--wait=60", *task]


def agent(launch: LaunchConfig, rendezvous: Rendezvous, argv: Sequence[str]) -> list[str]:
    """torchrun's arguments, on each node the same but for --node-rank, which comes before them.

    No restarts: on several nodes workers may reconnect to addresses from before the restart; who starts the job again
    goes on from the checkpoint.
    """
    host, port = rendezvous.host, rendezvous.port
    match launch.rendezvous:
        case "static":
            where = [f"--master-addr={host}", f"--master-port={port}"]
        case "c10d":
            where = ["--rdzv-backend=c10d", f"--rdzv-endpoint={host}:{port}", f"--rdzv-id={rendezvous.id}"]
        case other:
            assert_never(other)
    size = [f"--nnodes={launch.nodes}", f"--nproc-per-node={launch.processes_per_node}"]
    return [*size, *where, "--max-restarts=0", "--no-python", *argv]


def process_in_step(argv: Sequence[str], step: JobStep) -> list[str]:
    """A command as one process on the first node."""
    return [*srun_step(replace(step, hosts=step.hosts[:1])), *argv]


def srun_step(step: JobStep) -> list[str]:
    """One task per node with all of the node: its ranks share what the task has, so it is bound to no core."""
    number = len(step.hosts)
    container = pyxis(step.container, step.mounts, Path.cwd())
    return [
        "srun", f"--nodes={number}", f"--ntasks={number}", "--ntasks-per-node=1", f"--nodelist={','.join(step.hosts)}",
        "--export=ALL", "--cpu-bind=none", f"--output={literal(step.logs)}/%N.log", *container,
    ]  # fmt: skip


def literal(path: Path) -> str:
    """A path in which Slurm replaces nothing."""
    return str(path).replace("%", "%%")


def pyxis(container: str | None, mounts: Sequence[Path], workdir: Path) -> list[str]:
    """srun's options for a container: it sees the working directory and `mounts`, and nobody's home. UserError for
    folders whose names pyxis would take apart."""
    if container is None:
        return []
    seen = (workdir, *(path.resolve() for path in mounts))
    for folder in seen:
        if "," in str(folder) or ":" in str(folder):
            raise UserError(
                f"{folder}: a container cannot be given a folder with a comma or colon in its name; rename it"
            )
    folders = ",".join(f"{folder}:{folder}" for folder in seen)
    return [f"--container-image={container}", f"--container-mounts={folders}", f"--container-workdir={workdir}",
            "--no-container-mount-home"]  # fmt: skip


def gpu_request(option: Literal["gpus-per-node", "gres"], number: int) -> str:
    """How a cluster is asked for so many GPUs of each node."""
    match option:
        case "gpus-per-node":
            return f"--gpus-per-node={number}"
        case "gres":
            return f"--gres=gpu:{number}"
        case other:
            assert_never(other)


def port_of(job: int) -> int:
    """A port for a job's ranks: outside of what systems give to outgoing connections (32768 and above)."""
    return 10_000 + job % 20_000
