"""The environment of the processes that we start, their end with their parent, and their stacks on request."""

import ctypes
import faulthandler
import os
import signal
from collections.abc import Mapping

PR_SET_PDEATHSIG = 1
SHOW_STACKS = signal.SIGUSR2
# What `environment` sets; a container is given these by name, with whatever values they have.
SETTINGS = (
    "OMP_NUM_THREADS", "PYTHONSAFEPATH", "CUDA_DEVICE_MAX_CONNECTIONS", "HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY",
    "TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "PYTORCH_CUDA_ALLOC_CONF",
    "CUDA_VISIBLE_DEVICES", "OMP_WAIT_POLICY",
)  # fmt: skip
PREFERENCES = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


def environment(inherited: Mapping[str, str], threads: int, cpu: bool) -> dict[str, str]:
    """Return the environment of a stage's processes. env.sh has the reasons, and sets the same but for `cpu`."""
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONSAFEPATH": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if cpu:
        # Megatron wraps functions in torch.compile when it is imported; its fusions are for GPUs, and loading the
        # compiler costs every rank more than a second. Transformer Engine and apex are not expected on a CPU.
        settings["TORCHDYNAMO_DISABLE"] = "1"
        settings["PYTHONWARNINGS"] = "ignore:Transformer Engine and Apex,ignore:Apex is not installed"
    return PREFERENCES | dict(inherited) | settings


def die_with(parent_pid: int) -> None:
    """Ask Linux to kill this process when its parent ends, however it ends; for `preexec_fn`, since it survives the
    exec. Ends at once when the parent is already gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def show_stacks_when_asked() -> None:
    """Write the stacks of this process's threads to stderr whenever it gets SIGUSR2."""
    faulthandler.register(SHOW_STACKS, all_threads=True)
