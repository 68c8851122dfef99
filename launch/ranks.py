"""The start of a training stage's ranks: by torchrun on this node, or as a step of the Slurm allocation that this
process is in, with torchrun on each of its nodes."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

from srlm_mega.config import Config
from srlm_mega.config.launch import ContainerRuntime, LaunchConfig, SlurmConfig
from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.launch.child_process import srlm_command
from srlm_mega.launch.listening import LOOPBACK, free_port, ports_of
from srlm_mega.run.run_dir import RunDir

# A node's task of a step. What it is given: a file that all nodes must see, srlm and torchrun's arguments. USR1 (save)
# and USR2 (show stacks) are left to the ranks: they would end the agent. SLURM_NODEID is the node's own only here.
TASK = """\
trap "" USR1 USR2
if [ ! -e "$1" ]; then
  echo "node $(hostname) does not see $1: the run folder must be on a file system that all nodes share" >&2
  exit 2
fi
exec "$2" torchrun --node-rank="$SLURM_NODEID" "${@:3}"
"""


@dataclass(frozen=True)
class Start:
    """A command line, and the folder that its nodes log to; None where it prints itself."""

    argv: list[str]
    logs: Path | None = None


@dataclass(frozen=True)
class Allocation:
    """A Slurm job's nodes, and the number of times it was requeued."""

    job: int
    attempt: int
    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Rendezvous:
    """The place where ranks of several nodes find each other: a port of one node, the first with
    launch.rendezvous=static. With c10d the nodes choose the first themselves, and `id` keeps jobs apart."""

    host: str
    port: int
    id: str


@dataclass(frozen=True)
class JobStep:
    """A step of a Slurm allocation: its nodes, the folder of their logs, and its container if there is one, which sees
    the working directory, `mounts` and, if it needs them, the GPUs."""

    hosts: tuple[str, ...]
    logs: Path
    container: str | None
    mounts: tuple[Path, ...]
    runtime: ContainerRuntime = "pyxis"
    gpus: bool = True


def start_ranks(config: Config, run: RunDir, name: str, arguments: Sequence[str], shared_file: Path) -> Start:
    """Return how `srlm` starts with these arguments as all ranks, which must see `shared_file`; `name` is their log's.
    CannotContinue, with the command for each node, for several nodes without Slurm; UserError when it cannot be."""
    launch = config.launch
    match launch.launcher:
        case "torchrun":
            argv = [*srlm_command(), *arguments]
            if launch.nodes > 1:
                raise CannotContinue(by_hand(launch, name, argv))
            options = [f"--nproc-per-node={launch.processes_per_node}", f"--local-addr={LOOPBACK}", "--no-python"]
            return Start([*srlm_command(), "torchrun", "--standalone", *options, *argv])
        case "slurm":
            allocation = allocation_for(launch.nodes)
            step = job_step(config, run, allocation, name)
            host = step.hosts[0] if launch.nodes > 1 else LOOPBACK
            port = free_port(host, ports_of(allocation.job, launch.port_range))
            rendezvous = Rendezvous(host, port, f"{allocation.job}-{allocation.attempt}")
            programs = None if step.container is not None else Path(sys.executable).parent
            argv = [tool(programs, "srlm"), *arguments]
            return Start(ranks_in_step(programs, argv, launch, rendezvous, step, shared_file.absolute()), step.logs)
        case other:
            assert_never(other)


def start_one(config: Config, run: RunDir, name: str, arguments: Sequence[str], starts_steps: bool) -> Start:
    """Return how `srlm` starts as one process: in training's container, unless the process starts steps itself."""
    if config.launch.launcher == "slurm" and config.launch.slurm.container is not None and not starts_steps:
        step = job_step(config, run, allocation_for(1), name)
        return Start(process_in_step(["srlm", *arguments], step), step.logs)
    return Start([*srlm_command(), *arguments])


def allocation_for(nodes: int) -> Allocation:
    """Return the allocation. UserError when it has too few nodes, or the name of the first one does not resolve."""
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
    """Read the allocation from Slurm's variables. UserError outside of one, and where Slurm's commands are missing."""
    nodes = variables.get("SLURM_JOB_NODELIST")
    if nodes is None or "SLURM_JOB_ID" not in variables:
        raise UserError(
            "launch.launcher=slurm, but this is not a Slurm allocation (no SLURM_JOB_ID): `srlm launch slurm CONFIG "
            "--submit` makes one, or give launch.launcher=torchrun on one node"
        )
    if shutil.which("scontrol") is None:
        raise UserError(
            f"this is Slurm job {variables['SLURM_JOB_ID']}, and scontrol, which lists its nodes, is not on PATH: add "
            "the folder of Slurm's commands to PATH, or its module to launch.slurm.modules (module purge takes it away)"
        )
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if listed.returncode:
        raise UserError(f"scontrol show hostnames {nodes}: {listed.stderr.strip()}")
    attempt = number_in(variables, "SLURM_RESTART_COUNT", default=0)
    return Allocation(number_in(variables, "SLURM_JOB_ID", default=0), attempt, tuple(listed.stdout.split()))


def number_in(environment: Mapping[str, str], *names: str, default: int) -> int:
    """Return the number in the first of these variables that is set. UserError where it is none."""
    for name in names:
        if name in environment:
            try:
                return int(environment[name])
            except ValueError:
                raise UserError(
                    f"{name} must be a number, got {environment[name]!r}: unset it, or correct it"
                ) from None
    return default


def check_resolves(host: str) -> None:
    """UserError when a host name has no address here."""
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        raise UserError(
            f"the host name {host} does not resolve on {socket.gethostname()} ({error.strerror}), and ranks find each "
            "other there: every node needs its address, in DNS or in /etc/hosts"
        ) from None


def job_step(config: Config, run: RunDir, allocation: Allocation, name: str) -> JobStep:
    """Describe a step on the allocation's first nodes, with logs of this attempt."""
    slurm = config.launch.slurm
    return JobStep(
        hosts=allocation.hosts[: config.launch.nodes],
        logs=(run.jobs / str(allocation.job) / f"attempt_{allocation.attempt}" / name.replace("/", "-")).absolute(),
        container=slurm.container,
        mounts=(run.root, *slurm.mounts),
        runtime=slurm.container_runtime,
        gpus=config.trainer.device != "cpu",
    )


def by_hand(launch: LaunchConfig, name: str, argv: Sequence[str]) -> str:
    """Return the commands to type on the nodes of a cluster without Slurm."""
    script = Path(__file__).with_name("torchrun_multinode.sh")
    options = [f"--nnodes={launch.nodes}", f"--nproc-per-node={launch.processes_per_node}"]
    options += ["--rendezvous=c10d"] if launch.rendezvous == "c10d" else []
    threads = launch.threads(launch.processes_per_node)
    options += [f"--threads={threads}"] if threads > 1 else []
    lines = "\n".join(
        f"  {shlex.join([str(script), *options, f'--node-rank={rank}', '--master-addr=FIRST_NODE', *argv])}"
        for rank in range(launch.nodes)
    )
    return (
        f"{name} takes launch.nodes={launch.nodes}, and launch.launcher=torchrun starts processes on this node only. "
        "With Slurm: srlm launch slurm CONFIG. Without, start each line on its node, with the first one's name for "
        f"FIRST_NODE:\n{lines}\nThen `srlm run` continues with the next stage"
    )


def tool(bin_dir: Path | None, name: str) -> str:
    """Return the path of a command next to the Python, or its name, for a container's PATH."""
    return name if bin_dir is None else str(bin_dir / name)


def ranks_on_node(
    srlm: Sequence[str], argv: Sequence[str], launch: LaunchConfig, rendezvous: Rendezvous, node_rank: int
) -> list[str]:
    """Return the command line of this node's share of the ranks; every other node is given the same."""
    return [*srlm, "torchrun", f"--node-rank={node_rank}", *agent(launch, rendezvous, argv)]


def ranks_in_step(
    bin_dir: Path | None,
    argv: Sequence[str],
    launch: LaunchConfig,
    rendezvous: Rendezvous,
    step: JobStep,
    shared_file: Path,
) -> list[str]:
    """Return a command as ranks on all nodes of a step: one task per node, and torchrun in each. A node that does not
    see `shared_file` fails and says so. When a task fails, the others are ended."""
    task = ["bash", "-c", TASK, "task", str(shared_file), tool(bin_dir, "srlm"), *agent(launch, rendezvous, argv)]
    return [*srun_step(step, "--kill-on-bad-exit=1", "--wait=60"), *task]


def agent(launch: LaunchConfig, rendezvous: Rendezvous, argv: Sequence[str]) -> list[str]:
    """Return torchrun's arguments, the same on each node but for --node-rank, which comes before them. No restarts:
    workers may reconnect to addresses from before the restart. Started again, the job resumes from its checkpoint."""
    host, port = rendezvous.host, rendezvous.port
    match launch.rendezvous:
        case "static":
            where = [f"--master-addr={host}", f"--master-port={port}"]
        case "c10d":
            where = ["--rdzv-backend=c10d", f"--rdzv-endpoint={host}:{port}", f"--rdzv-id={rendezvous.id}"]
        case other:
            assert_never(other)
    size = [f"--nnodes={launch.nodes}", f"--nproc-per-node={launch.processes_per_node}"]
    where += [f"--local-addr={LOOPBACK}"] if launch.nodes == 1 else []
    return [*size, *where, "--max-restarts=0", "--no-python", *argv]


def process_in_step(argv: Sequence[str], step: JobStep) -> list[str]:
    """Return a command as one process on the step's first node."""
    return [*srun_step(replace(step, hosts=step.hosts[:1])), *argv]


def srun_step(step: JobStep, *options: str) -> list[str]:
    """Return srun for one task per node, which has all of the node and is bound to no core: its ranks share it."""
    number = len(step.hosts)
    container = in_container(step.runtime, step.container, step.mounts, Path.cwd(), step.gpus)
    return [
        "srun", f"--nodes={number}", f"--ntasks={number}", "--ntasks-per-node=1", f"--nodelist={','.join(step.hosts)}",
        "--export=ALL", "--cpu-bind=none", f"--output={literal(step.logs)}/%N.log", *options, *container,
    ]  # fmt: skip


def literal(path: Path) -> str:
    """Escape a path in which Slurm would replace %."""
    return str(path).replace("%", "%%")


def in_container(
    runtime: ContainerRuntime, image: str | None, mounts: Sequence[Path], workdir: Path, gpus: bool
) -> list[str]:
    """Return the words that come between srun, with its options, and a command that runs in a container; none without
    an image. UserError for folders whose names would be taken apart."""
    match runtime:
        case "pyxis":
            return pyxis(image, mounts, workdir)
        case "apptainer" | "singularity":
            return [] if image is None else apptainer(runtime, image, mounts, workdir, gpus)
        case other:
            assert_never(other)


def apptainer(program: str, image: str, mounts: Sequence[Path], workdir: Path, gpus: bool) -> list[str]:
    """Return `apptainer exec`, or singularity's, in which only the folders, the GPUs and the variables are the host's.
    Not run by this project."""
    bound = ",".join(str(folder) for folder in seen_folders(mounts, workdir))
    return [program, "exec", *(["--nv"] if gpus else []), "--no-home", f"--bind={bound}", f"--pwd={workdir}", image]


def pyxis(container: str | None, mounts: Sequence[Path], workdir: Path) -> list[str]:
    """Return srun's options for a container that sees the working directory and `mounts`, and no home folder. UserError
    for folders whose names pyxis would take apart."""
    if container is None:
        return []
    folders = ",".join(f"{folder}:{folder}" for folder in seen_folders(mounts, workdir))
    return [f"--container-image={container}", f"--container-mounts={folders}", f"--container-workdir={workdir}",
            "--no-container-mount-home"]  # fmt: skip


def seen_folders(mounts: Sequence[Path], workdir: Path) -> tuple[Path, ...]:
    """Return the folders that a container sees, those that are links under both names, since a configuration has the
    one and links elsewhere lead to the other. UserError for a name that would be taken apart at commas and colons."""
    names = (name for path in mounts for name in (path.resolve(), Path(os.path.abspath(path))))
    seen = (workdir, *dict.fromkeys(names))
    for folder in seen:
        if "," in str(folder) or ":" in str(folder):
            raise UserError(
                f"{folder}: a container cannot be given a folder with a comma or colon in its name; rename it"
            )
    return seen


def gpu_request(slurm: SlurmConfig, number: int) -> str:
    """Return the option that asks for `number` GPUs of each node."""
    gpus = str(number) if slurm.gpu_type is None else f"{slurm.gpu_type}:{number}"
    match slurm.gpu_option:
        case "gpus-per-node":
            return f"--gpus-per-node={gpus}"
        case "gres":
            return f"--gres=gpu:{gpus}"
        case other:
            assert_never(other)
