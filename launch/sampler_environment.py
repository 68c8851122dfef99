"""The environment of the sampler's processes (another Python, a container, steps of the Slurm allocation), and the
command line that starts them there. Containers and `srun --mpi` have not been run yet."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from srlm_mega.config import Config
from srlm_mega.errors import UserError
from srlm_mega.launch.child_process import SETTINGS
from srlm_mega.launch.ranks import gpu_request, number_in, pyxis


def check_sampler_environment(config: Config) -> None:
    """UserError when the environment has no `srlm`, or its container cannot be given the folders."""
    sampler = config.sampler
    if sampler.container is None and not Path(program(config)).is_file():
        raise UserError(
            f"sampler.python {sampler.python or sys.executable}: there is no srlm next to it. In that "
            "environment: pip install --no-deps srlm-mega, and what docs/sampling.md lists"
        )
    if sampler.slurm:
        try:
            pyxis(sampler.container, sampler.mounts, Path.cwd())
        except UserError as error:
            raise UserError(f"sampler.mounts: {error}") from None


def sampler_process(config: Config, arguments: Sequence[str]) -> list[str]:
    """Return the command of `srlm` in the sampler's environment. UserError when it cannot be entered. Under Slurm it is
    a step of this allocation: TP * PP tasks of which the first runs the command and the others wait for it
    (trtllm-llmapi-launch), over several nodes where one is too small."""
    check_sampler_environment(config)
    sampler = config.sampler
    if sampler.slurm:
        mpi = ["trtllm-llmapi-launch"] if config.sampler.traits.needs_mpi else []
        return [*srun_replica(config), *mpi, program(config), *arguments]
    container = [] if sampler.container is None else docker(config, sampler.container)
    return [*container, program(config), *arguments]


def program(config: Config) -> str:
    """Return the path of `srlm` next to the Python, or its name, for a container's PATH."""
    sampler = config.sampler
    if sampler.container is not None:
        return "srlm"
    return str(Path(sampler.python or sys.executable).absolute().parent / "srlm")


def docker(config: Config, image: str) -> list[str]:
    """Return `docker run` for a container on this node that sees the working directory, `mounts` and all GPUs, and ends
    with the process. It gets the processes' settings and the keys of external judges from the environment, by name."""
    here = Path.cwd()
    mounts = (path.resolve() for path in config.sampler.mounts)
    judges = config.pairwise_judges.values()
    keys = sorted({judge.api_key_variable for judge in judges if judge.api_key_variable is not None})
    volumes = [f"--volume={folder}:{folder}" for folder in (here, *mounts)]
    names = [f"--env={name}" for name in (*SETTINGS, *keys)]
    return ["docker", "run", "--rm", "--init", "--gpus=all", "--ipc=host", *names, *volumes, f"--workdir={here}",
            image]  # fmt: skip


def srun_replica(config: Config) -> list[str]:
    """Return srun for one replica, in its container (pyxis) if it has one. --exact and --mem=0: steps share nodes."""
    sampler, devices = config.sampler, config.sampler.devices_per_replica
    mpi = config.sampler.traits.needs_mpi
    nodes = -(-devices // sampler.devices_per_node)
    tasks = devices if mpi else 1
    cpus = max(1, number_in(os.environ, "SLURM_CPUS_ON_NODE", default=1) // sampler.devices_per_node)
    argv = [
        "srun", "--exact", f"--nodes={nodes}", f"--ntasks={tasks}", f"--ntasks-per-node={-(-tasks // nodes)}",
        f"--cpus-per-task={cpus}", "--mem=0", "--kill-on-bad-exit=1", "--export=ALL",
    ]  # fmt: skip
    if config.sampler.device != "cpu":
        argv.append(gpu_request(config.launch.slurm.gpu_option, min(devices, sampler.devices_per_node)))
    argv += ["--mpi=pmix"] if mpi else []
    return [*argv, *pyxis(sampler.container, sampler.mounts, Path.cwd())]


def devices_of(replica: int, config: Config) -> dict[str, str]:
    """Return CUDA_VISIBLE_DEVICES of one of the replicas on this node; nothing under Slurm, where the step decides."""
    if config.sampler.slurm:
        return {}
    devices = config.sampler.devices_per_replica
    first = replica * devices
    return {"CUDA_VISIBLE_DEVICES": ",".join(str(device) for device in range(first, first + devices))}
