"""The processes that we start: their commands, their environment, their end with their parent, and their stacks on
request."""

import ctypes
import faulthandler
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from srlm_mega.errors import UserError

PR_SET_PDEATHSIG = 1
SHOW_STACKS = signal.SIGUSR2
PARENT_PID, RANK_MARK = "SRLM_PARENT_PID", "TORCHELASTIC_RUN_ID"  # ours and torch's, of torchrun's ranks alone
# What every process of a run is given; of PREFERENCES a user's own values count.
SETTINGS = {
    "PYTHONSAFEPATH": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
PREFERENCES = {"OMP_WAIT_POLICY": "PASSIVE", "NCCL_DEBUG": "WARN"}
# What is for training and bad for engines that sample (`sampler_variables` takes it away).
TRAINING_SETTINGS = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
TRAINING_PREFERENCES = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
ONE_NODE_PREFERENCES = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
INTERFACES = "SRLM_NETWORK_INTERFACES"  # names of launch.slurm.network_interface, with spaces between
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
# Megatron wraps functions in torch.compile when it is imported; its fusions are for GPUs, and loading the compiler
# costs every rank more than a second. Transformer Engine and apex are not expected on a CPU.
CPU_TRAINING_SETTINGS = {
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONWARNINGS": "ignore:Transformer Engine and Apex,ignore:Apex is not installed",
}


def srlm_command() -> list[str]:
    """Return how `srlm` starts with this Python: the command beside it, or, where the package is not installed and only
    on PYTHONPATH, its module."""
    command = Path(sys.executable).parent / "srlm"
    return [str(command)] if command.exists() else [sys.executable, "-P", "-m", "srlm_mega.cli.start"]


def environment(inherited: Mapping[str, str], threads: int, cpu: bool, one_node: bool = False) -> dict[str, str]:
    """Return the environment of a stage's processes. env.sh has the reasons, and sets the same on several nodes with
    GPUs; on one node ranks talk over the loopback interface."""
    preferences = PREFERENCES | TRAINING_PREFERENCES | own_allocator(inherited) | node_local(inherited)
    preferences |= ONE_NODE_PREFERENCES if one_node else {}
    settings = SETTINGS | TRAINING_SETTINGS | {"OMP_NUM_THREADS": str(threads)}
    return preferences | dict(inherited) | settings | (CPU_TRAINING_SETTINGS if cpu else {})


def own_allocator(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of PyTorch's allocator that a user gave under one of the two names, under both."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    given = [inherited[name] for name in names if name in inherited]
    return dict.fromkeys(names, given[0]) if given else {}


def node_local(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return where processes keep compiled kernels and other files for a while: on the node's own disk, since many
    ranks that compile into one shared home lose files to each other."""
    scratch = inherited.get("SLURM_TMPDIR") or inherited.get("TMPDIR") or "/tmp"
    root = Path(scratch) / f"srlm-{os.getuid()}"
    return {"TMPDIR": inherited.get("TMPDIR") or scratch} | {name: str(root / part) for name, part in CACHES.items()}


def interface_here(variables: Mapping[str, str]) -> str | None:
    """Return the first of the configured network interfaces that this node has; None where none is configured. OSError
    names those that it has."""
    names = variables.get(INTERFACES, "").split()
    here = sorted(os.listdir("/sys/class/net"))
    found = next((name for name in names if name in here), None)
    if names and found is None:
        raise OSError(f"no interface {' or '.join(names)} (launch.slurm.network_interface), but {', '.join(here)}")
    return found


def adapt_to_node(variables: MutableMapping[str, str]) -> None:
    """Change, before torch is imported, what only this node or its container knows: the folder of our caches has to be
    made and to be this user's, else a new one takes its place; TMPDIR, which a container may not have, has to be there;
    torch warns of the allocator's old name since 2.9; the network's interface may have another name. UserError where it
    has none."""
    try:
        interface = interface_here(variables)
    except OSError as error:
        raise UserError(f"{socket.gethostname()} has {error}") from None
    names = variables.get(INTERFACES, "").split()
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if interface is not None and variables.get(variable, interface) in names:  # else it is the user's
            variables[variable] = interface
    ours = node_local(variables)
    root = Path(ours["TRITON_CACHE_DIR"]).parent
    own = False
    with suppress(OSError):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        own = root.stat().st_uid == os.getuid() and os.access(root, os.W_OK)
    if not own:
        root = Path(tempfile.mkdtemp(prefix="srlm-"))
    if not os.access(ours["TMPDIR"], os.W_OK | os.X_OK) or not os.path.isdir(ours["TMPDIR"]):
        variables["TMPDIR"] = tempfile.gettempdir()
    for name, part in CACHES.items():
        if variables.get(name, ours[name]) == ours[name]:
            variables[name] = str(root / part)
    with suppress(PackageNotFoundError):
        if tuple(map(int, version("torch").split(".")[:2])) >= (2, 9) and "PYTORCH_ALLOC_CONF" in variables:
            variables.pop("PYTORCH_CUDA_ALLOC_CONF", None)


def die_with(parent_pid: int) -> None:
    """Ask Linux to kill this process when its parent ends, however it ends; for `preexec_fn`, since it survives the
    exec. Ends at once when the parent is already gone: its pid has to be known from before this process began."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def die_with_parent() -> None:
    """End with the process that started this one. Ranks also end when it is already gone: torchrun's agent gives them
    its pid, since asked for by a rank the parent's pid is another one by then."""
    parent = os.environ.get(PARENT_PID, "") if RANK_MARK in os.environ else ""
    die_with(int(parent) if parent.isdecimal() else os.getppid())


@contextmanager
def ending_children() -> Iterator[None]:
    """Kill this process's children, for which other threads wait, when the block is left by an exception."""
    try:
        yield
    except BaseException:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        raise


def show_stacks_when_asked() -> None:
    """Write the stacks of this process's threads to stderr whenever it gets SIGUSR2."""
    faulthandler.register(SHOW_STACKS, all_threads=True)
