"""A node's report on itself before a job. Each check has its own time limit: a dead driver or name server makes one
answer missing, and the preflight does not hang."""

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from srlm_mega.launch.child_process import die_with, interface_here

PACKAGES = (
    "srlm-mega", "torch", "megatron-core", "transformer-engine", "flash-attn", "triton", "transformers", "numpy",
    "safetensors", "nvidia-nccl-cu12", "nvidia-nccl-cu13",
)  # fmt: skip
NVIDIA_SMI = (
    "nvidia-smi", "--query-gpu=name,driver_version,ecc.errors.uncorrected.volatile.total",
    "--format=csv,noheader,nounits",
)  # fmt: skip
T = TypeVar("T")


@dataclass(frozen=True)
class InstalledGpu:
    """A GPU as nvidia-smi lists it. `ecc_errors`: uncorrected ones since the driver was loaded; None if not counted."""

    name: str
    ecc_errors: int | None = None


@dataclass(frozen=True)
class NodeReport:
    """A node's answers; one that is None could not be had, and `unanswered` names the check and the reason."""

    node: str
    rank: int
    versions: Mapping[str, str]  # package -> version; absent packages are not there
    gpus: tuple[InstalledGpu, ...] | None = None
    addresses: tuple[str, ...] | None = None  # what its own host name resolves to
    foreign_addresses: tuple[str, ...] = ()  # those of them that are another machine's
    free_bytes: int | None = None  # for the run folder
    open_files: int | None = None  # ulimit -n, of each process; None: no limit
    locked_bytes: int | None = None  # ulimit -l; None: no limit
    infiniband: bool = False
    network: str = ""  # the same for nodes that are one machine
    clock_ahead: float = 0.0  # seconds its clock is ahead of node 0's, and how far that may be off
    clock_error: float = 0.0
    sees_head: bool = True  # it read in the shared folder what node 0 wrote there
    head_sees: bool = True  # and the other way
    unanswered: Mapping[str, str] | None = None


def local_report(node: str, rank: int, folder: Path, with_gpus: bool, seconds: float) -> NodeReport:
    """Run the checks that take this node alone, for at most `seconds`. `folder`: where the run will write."""
    deadline = time.monotonic() + seconds
    versions, gpus = TimedCheck(installed_versions), TimedCheck(lambda: visible_gpus() if with_gpus else (None, {}))
    name, disk = TimedCheck(own_addresses), TimedCheck(lambda: free_bytes(folder))
    asked: dict[str, TimedCheck[Any]] = {"versions": versions, "GPUs": gpus, "host name": name, "free disk": disk}
    asked["network interface"] = TimedCheck(lambda: interface_here(os.environ))
    unanswered = {check: why for check, question in asked.items() if (why := question.failure(deadline)) is not None}
    devices, same = gpus.answer or (None, {})
    addresses, foreign = name.answer or (None, ())
    return NodeReport(
        node=node,
        rank=rank,
        versions=(versions.answer or {}) | same,
        gpus=devices,
        addresses=addresses,
        foreign_addresses=foreign,
        free_bytes=disk.answer,
        open_files=soft_limit(resource.RLIMIT_NOFILE),
        locked_bytes=soft_limit(resource.RLIMIT_MEMLOCK),
        infiniband=any(Path("/sys/class/infiniband").glob("*")),
        network=network(),
        unanswered=unanswered,
    )


class TimedCheck(Generic[T]):
    """A check that runs in a thread of its own, which is abandoned if it hangs."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self.answer: T | None = None
        self._failure: str | None = None
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._work, args=(ask,), daemon=True)
        self._thread.start()

    def _work(self, ask: Callable[[], T]) -> None:
        try:
            self.answer = ask()
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            self._failure = str(error)

    def failure(self, deadline: float) -> str | None:
        """Return why there is no answer by `deadline` (`time.monotonic()`), or None when there is one."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            return f"no answer in {deadline - self._begun:.0f} s"
        return self._failure


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that are installed, from their metadata: nothing is imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def visible_gpus() -> tuple[tuple[InstalledGpu, ...], dict[str, str]]:
    """Return the GPUs that this job may use, and what should be the same on all nodes: their kinds and the driver.
    OSError without nvidia-smi, which hangs on some broken GPUs. Not run on a GPU by this project."""
    die = partial(die_with, os.getpid())
    done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=60, preexec_fn=die)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise OSError(f"nvidia-smi ended with {done.returncode}: {said[-1] if said else 'nothing said'}")
    return parse_nvidia_smi(done.stdout, os.environ)


def parse_nvidia_smi(text: str, environment: Mapping[str, str]) -> tuple[tuple[InstalledGpu, ...], dict[str, str]]:
    """Parse lines `name, driver, errors` ([N/A] where a GPU counts none). CUDA_VISIBLE_DEVICES hides some GPUs."""
    rows = [[field.strip() for field in line.split(",")] for line in text.splitlines() if line.strip()]
    gpus = [InstalledGpu(name, int(errors) if errors.isdecimal() else None) for name, _, errors in rows]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        numbers = [int(name) for name in names if name.isdecimal()]
        within_reach = len(numbers) == len(names) and all(number < len(gpus) for number in numbers)
        gpus = [gpus[number] for number in numbers] if within_reach else gpus[: len(names)]
    same = {"driver": ", ".join(sorted({driver for _, driver, _ in rows}))}
    return tuple(gpus), same | {"GPU": ", ".join(sorted({gpu.name for gpu in gpus}))}


def soft_limit(which: int) -> int | None:
    """Return the limit that holds for this process, and for the ranks that Slurm starts like it; None without one."""
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def own_addresses() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the addresses of this host's own name, and those of them that this machine does not have."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return (), ()
    addresses = tuple(dict.fromkeys(str(where[0]) for *_, where in found))
    return addresses, tuple(address for address in addresses if not is_own(address))


def network() -> str:
    """Return an id of the network stack: this boot of this machine and, in a container, the container's namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/net')}"


def is_own(address: str) -> bool:
    """Tell whether this machine has the address: only then can a socket be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the folder's file system; what the run has written already counts as free."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    return shutil.disk_usage(existing).free + written
