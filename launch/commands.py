"""The command line of stages: one process, torchrun on one node or on many, steps of a Slurm allocation, or the
sampler's environment. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, assert_never

from srlm_mega.errors import UserError

# What `environment` sets; a container is given these by name, with whatever values they have.
SETTINGS = (
    "OMP_NUM_THREADS", "PYTHONSAFEPATH", "CUDA_DEVICE_MAX_CONNECTIONS", "HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY",
    "TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "PYTORCH_CUDA_ALLOC_CONF",
    "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


PREFERENCES = {
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
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
class Meeting:
    """How ranks on several nodes meet: at a port of the first one. `static`: node_rank says who is first; otherwise
    c10d, where the nodes decide among themselves, and `id` keeps jobs apart."""

    nodes: int
    processes_per_node: int
    host: str
    port: int
    static: bool
    id: str


@dataclass(frozen=True)
class Step:
    """How steps of a Slurm allocation start: on these nodes, with a file per node in `logs`, in a container (pyxis)
    where one is given, which sees the working directory and `mounts`."""

    hosts: tuple[str, ...]
    logs: Path
    container: str | None
    mounts: tuple[Path, ...]


def one_process(bin_dir: Path | None, run: Path, stages: Sequence[str]) -> list[str]:
    """Stages, one after another, in one process of the `srlm` command in `bin_dir`."""
    return [tool(bin_dir, "srlm"), "stage", str(run), *stages]


def tool(bin_dir: Path | None, name: str) -> str:
    """A command beside the Python, or on a container's PATH."""
    return name if bin_dir is None else str(bin_dir / name)


def torchrun(bin_dir: Path, run: Path, stages: Sequence[str], processes: int) -> list[str]:
    """Stages, one after another, in all ranks."""
    return ranks(bin_dir, one_process(bin_dir, run, stages), processes)


def ranks(bin_dir: Path, argv: Sequence[str], processes: int) -> list[str]:
    """A command as `processes` ranks on this node, joined by a rendezvous on a free port."""
    return [str(bin_dir / "torchrun"), "--standalone", f"--nproc-per-node={processes}", "--no-python", *argv]


def agent(meeting: Meeting, argv: Sequence[str]) -> list[str]:
    """torchrun's arguments, on each node the same but for --node-rank, which comes before them.

    No restarts: on several nodes workers may reconnect to addresses from before the restart; who starts the job again
    goes on from the checkpoint.
    """
    if meeting.static:
        place = [f"--master-addr={meeting.host}", f"--master-port={meeting.port}"]
    else:
        place = ["--rdzv-backend=c10d", f"--rdzv-endpoint={meeting.host}:{meeting.port}", f"--rdzv-id={meeting.id}"]
    size = [f"--nnodes={meeting.nodes}", f"--nproc-per-node={meeting.processes_per_node}"]
    return [*size, *place, "--max-restarts=0", "--no-python", *argv]


def ranks_on_node(bin_dir: Path | None, argv: Sequence[str], meeting: Meeting, node_rank: int) -> list[str]:
    """A command as this node's share of the ranks; the same is started on every other node."""
    return [tool(bin_dir, "torchrun"), f"--node-rank={node_rank}", *agent(meeting, argv)]


def ranks_in_step(
    bin_dir: Path | None, argv: Sequence[str], meeting: Meeting, step: Step, shared_file: Path
) -> list[str]:
    """A command as ranks on all nodes of a step: one task per node, and torchrun in each. A node that does not see
    `shared_file` says so. When a task fails, the others end."""
    task = ["bash", "-c", TASK, "task", str(shared_file), tool(bin_dir, "torchrun"), *agent(meeting, argv)]
    return [*srun_step(step), "--kill-on-bad-exit=1", "--wait=60", *task]


def process_in_step(argv: Sequence[str], step: Step) -> list[str]:
    """A command as one process on the first node."""
    return [*srun_step(replace(step, hosts=step.hosts[:1])), *argv]


def srun_step(step: Step) -> list[str]:
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


@dataclass(frozen=True)
class SamplerPlace:
    """Where a process of the sampler runs. `python`: of an environment with srlm-mega; with `container`, the image's
    own is taken. `devices` hold the model once; `mpi`: TensorRT-LLM, which wants one task per device; `variables`: what
    of the environment a container is given besides `SETTINGS`, by name."""

    python: Path
    container: str | None
    mounts: tuple[Path, ...]
    slurm: bool
    devices: int
    devices_per_node: int
    mpi: bool
    cpu: bool = False
    cpus_per_task: int = 1
    variables: tuple[str, ...] = ()
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"


def sampler_process(place: SamplerPlace, arguments: Sequence[str]) -> list[str]:
    """`srlm` with these arguments in the sampler's environment; containers and srun were never run so far.

    Under Slurm it is a step of this allocation: TP * PP tasks of which the first runs the command and the others wait
    for it (trtllm-llmapi-launch), over several nodes where one is too small; --exact lets steps share a node, --mem=0
    its memory.
    """
    if place.slurm:
        return [*srun(place), *(["trtllm-llmapi-launch"] if place.mpi else []), program(place), *arguments]
    return [*(docker(place) if place.container else []), program(place), *arguments]


def program(place: SamplerPlace) -> str:
    """The `srlm` beside the Python, or on a container's PATH."""
    return "srlm" if place.container else str(place.python.parent / "srlm")


def docker(place: SamplerPlace) -> list[str]:
    """A container on this node that sees the working directory, `mounts` and all GPUs, and ends with the process."""
    assert place.container is not None
    here = Path.cwd()
    volumes = [f"--volume={folder}:{folder}" for folder in (here, *(path.resolve() for path in place.mounts))]
    names = [f"--env={name}" for name in (*SETTINGS, *place.variables)]
    return ["docker", "run", "--rm", "--init", "--gpus=all", "--ipc=host", *names, *volumes, f"--workdir={here}",
            place.container]  # fmt: skip


def srun(place: SamplerPlace) -> list[str]:
    """A step of this allocation for one replica, in a container (pyxis) where one is given."""
    nodes = -(-place.devices // place.devices_per_node)
    tasks = place.devices if place.mpi else 1
    argv = [
        "srun", "--exact", f"--nodes={nodes}", f"--ntasks={tasks}", f"--ntasks-per-node={-(-tasks // nodes)}",
        f"--cpus-per-task={place.cpus_per_task}", "--mem=0", "--kill-on-bad-exit=1", "--export=ALL",
    ]  # fmt: skip
    argv += [] if place.cpu else [gpu_request(place.gpu_option, min(place.devices, place.devices_per_node))]
    argv += ["--mpi=pmix"] if place.mpi else []
    return [*argv, *pyxis(place.container, place.mounts, Path.cwd())]


def devices_of(replica: int, place: SamplerPlace) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES of a replica beside others on this node. Under Slurm the step decides."""
    if place.slurm:
        return {}
    first = replica * place.devices
    return {"CUDA_VISIBLE_DEVICES": ",".join(str(device) for device in range(first, first + place.devices))}


def environment(inherited: Mapping[str, str], threads: int, cpu: bool) -> dict[str, str]:
    """The environment of a stage's processes; what several nodes need of it is in env.sh too, with the reasons.

    - OMP_NUM_THREADS: ranks share the cores; more threads than cores make every rank slower.
    - PYTHONSAFEPATH: the project's root holds folders named `kernels` and `tools`, which other packages would find.
    - CUDA_DEVICE_MAX_CONNECTIONS: Megatron's overlap of tensor-parallel communication wants one queue.
    - PREFERENCES: unless somebody set them. NCCL speaks when something is wrong; a rank whose partner is lost ends with
      an error; the allocator grows what it has, as batches differ in length.
    - HF_HUB_OFFLINE, TRANSFORMERS_VERBOSITY: a stage reads local files only, and says what is worth saying itself.
    - TORCHDYNAMO_DISABLE (CPU): Megatron wraps functions in torch.compile when it is imported; its fusions are for
      GPUs, and loading the compiler costs every rank more than a second.
    - PYTHONWARNINGS: that Transformer Engine and apex are absent is known on a CPU.
    """
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONSAFEPATH": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if cpu:
        settings["TORCHDYNAMO_DISABLE"] = "1"
        settings["PYTHONWARNINGS"] = "ignore:Transformer Engine and Apex,ignore:Apex is not installed"
    return PREFERENCES | dict(inherited) | settings
