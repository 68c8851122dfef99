"""The command line of stages: one process, or torchrun on one node. Pure functions."""

from collections.abc import Sequence
from pathlib import Path


def one_process(bin_dir: Path, run: Path, stages: Sequence[str]) -> list[str]:
    """Stages, one after another, in one process of the `srlm` command in `bin_dir`."""
    return [str(bin_dir / "srlm"), "stage", str(run), *stages]


def torchrun(bin_dir: Path, run: Path, stages: Sequence[str], processes: int) -> list[str]:
    """Stages, one after another, as `processes` ranks on this node, joined by a rendezvous on a free port."""
    return [
        str(bin_dir / "torchrun"),
        "--standalone",
        f"--nproc-per-node={processes}",
        "--no-python",
        *one_process(bin_dir, run, stages),
    ]


def environment(inherited: dict[str, str], threads: int) -> dict[str, str]:
    """The environment of a stage's processes.

    - OMP_NUM_THREADS: ranks share the cores; more threads than cores make every rank slower.
    - PYTHONSAFEPATH: the project's root holds folders named `kernels` and `tools`, which other packages would find.
    - CUDA_DEVICE_MAX_CONNECTIONS: Megatron's overlap of tensor-parallel communication wants one queue.
    - HF_HUB_OFFLINE, TRANSFORMERS_VERBOSITY: a stage reads local files only, and says what is worth saying itself.
    """
    return inherited | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONSAFEPATH": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
