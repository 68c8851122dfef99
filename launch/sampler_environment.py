"""The environment of the sampler's processes (their variables, another Python, a container, steps of the Slurm
allocation), and the command line that starts them there. Containers and `srun --mpi` have not been run yet."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4

from srlm_mega.config import Config
from srlm_mega.errors import UserError
from srlm_mega.launch.child_process import (
    CPU_TRAINING_SETTINGS,
    PREFERENCES,
    SETTINGS,
    TRAINING_PREFERENCES,
    TRAINING_SETTINGS,
    node_local,
)
from srlm_mega.launch.ranks import gpu_request, in_container, number_in, seen_folders
from srlm_mega.run.lock import TOKEN

# Our own values of what is for training: with any other value a variable is the user's.
OURS = TRAINING_SETTINGS | TRAINING_PREFERENCES | CPU_TRAINING_SETTINGS
HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES where there is to be no GPU, the last one Slurm's
# A container is given these by name, where they are set.
PASSED_ON = (*SETTINGS, *PREFERENCES, *OURS, "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", TOKEN)

# A task of an MPI replica's step. What it is given: TensorRT-LLM's launcher ($0), which starts the command in its first
# task and an MPI leader beside it, and the command. Older launchers (1.1.0rc6) split the command's words at spaces, so
# it is in a file, and let the leader live when the command fails. So the first task ends with the command's code, after
# a success with 30 s for the launcher to end the leader, and srun then ends the step (--kill-on-bad-exit). Other tasks
# that are ended so say 0, also where their launcher is ended first: srun returns the highest code, and the command's is
# to be read. USR1 and USR2 (show stacks) are left to the command: they would end the launcher.
LAUNCHER = """\
trap "" USR1 USR2
if [ "${SLURM_PROCID:-0}" != 0 ]; then
  trap 'kill $!; exit 0' TERM
  "$0" "$@" &
  wait $!
  exit $(($? == 143 ? 0 : $?))
fi
folder=$(mktemp -d /tmp/srlm.XXXXXXXX) || exit 1
{ printf '%q ' "$@"; printf '\ncode=$?; echo $code >%s/code; exit $code\n' "$folder"; } >"$folder/command"
"$0" bash "$folder/command" &
while kill -0 $! 2>/dev/null && [ ! -s "$folder/code" ]; do sleep 0.2; done
if [ -s "$folder/code" ]; then
  code=$(<"$folder/code")
else
  wait $!
  code=$?
  [ "$code" != 0 ] || code=1
  echo "$0 ended with $code before its command did" >&2
fi
rm -rf "$folder"
[ "$code" != 0 ] || for _ in {1..30}; do kill -0 $! 2>/dev/null && sleep 1; done
if [ "$code" != 0 ] || kill -0 $! 2>/dev/null; then
  trap "" TERM
  kill -TERM 0 # what the launcher left: not every Slurm finds it
fi
exit "$code"
"""


def check_sampler_environment(config: Config) -> None:
    """UserError when the environment has no `srlm`, its container cannot be given the folders, or the Slurm allocation
    has fewer nodes than the replicas are on."""
    sampler = config.sampler
    if sampler.container is None and not Path(program(config)).is_file():
        raise UserError(
            f"sampler.python {sampler.python or sys.executable}: there is no srlm next to it. In that "
            "environment: pip install --no-deps srlm-mega, and what docs/sampling.md lists"
        )
    if sampler.slurm:
        try:
            seen_folders(sampler.mounts, Path.cwd()) if sampler.container is not None else ()
        except UserError as error:
            raise UserError(f"sampler.mounts: {error}") from None
        nodes = node_of(config.sampler_replicas - 1, config) + -(
            -sampler.devices_per_replica // sampler.devices_per_node
        )
        if (here := number_in(os.environ, "SLURM_JOB_NUM_NODES", default=nodes)) < nodes:
            raise UserError(
                f"sampler.num_devices={sampler.num_devices} are {nodes} nodes of {sampler.devices_per_node} "
                f"(sampler.devices_per_node), and this allocation has {here}: ask for more (--nodes), or "
                "lower num_devices"
            )


def sampler_process(config: Config, arguments: Sequence[str], replica: int | None = None) -> list[str]:
    """Return the command of `srlm` in the sampler's environment, for one of the replicas or (None) for a process that
    samples alone. UserError when it cannot be entered. Under Slurm it is a step of this allocation, a replica's on the
    nodes that are its own; where an engine needs MPI, with a task per GPU of which the first runs the command."""
    check_sampler_environment(config)
    sampler = config.sampler
    if sampler.slurm:
        mpi = ["bash", "-c", LAUNCHER, "trtllm-llmapi-launch"] if sampler.traits.needs_mpi else []
        return [*srun_replica(config, replica), *mpi, program(config), *arguments]
    container = [] if sampler.container is None else container_here(config, sampler.container, replica)
    return [*container, program(config), *arguments]


def container_here(config: Config, image: str, replica: int | None) -> list[str]:
    """Return the words before a command that runs in a container on this node."""
    runtime, sampler = config.launch.slurm.container_runtime, config.sampler
    if runtime == "pyxis":
        return docker(config, image, replica)
    return in_container(runtime, image, sampler.mounts, Path.cwd(), sampler.device != "cpu")


def sampler_variables(inherited: Mapping[str, str], config: Config, replica: int | None) -> dict[str, str]:
    """Return the whole environment of a process that `sampler_process` starts: what is inherited without what is for
    training (each variable that has exactly our value; with another value it is the user's, and stays), and what
    samplers need. OMP_NUM_THREADS is set where the model computes on CPUs, and nowhere inherited. UserError where
    CUDA_VISIBLE_DEVICES has too few devices."""
    sampler = config.sampler
    kept = {name: value for name, value in inherited.items() if OURS.get(name) != value and name != "OMP_NUM_THREADS"}
    made = PREFERENCES | node_local(inherited) | kept | SETTINGS
    if not sampler.on_gpus:
        made["OMP_NUM_THREADS"] = str(config.sampling_threads)
    if sampler.container is None:  # an MPI engine's launcher, and the python3 that it calls, are this environment's
        folder = str(Path(program(config)).parent)
        made["PATH"] = f"{folder}:{inherited['PATH']}" if "PATH" in inherited else folder
    if sampler.slurm and sampler.traits.needs_mpi:
        # Launchers of one node that look for a free port may find the same one. Every node and image has /tmp.
        made["TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR"] = f"ipc:///tmp/srlm-{uuid4().hex}"
    return made if replica is None else made | devices_of(replica, config, inherited.get("CUDA_VISIBLE_DEVICES"))


def program(config: Config) -> str:
    """Return the path of `srlm` next to the Python, or its name, for a container's PATH."""
    sampler = config.sampler
    if sampler.container is not None:
        return "srlm"
    return str(Path(sampler.python or sys.executable).absolute().parent / "srlm")


def docker(config: Config, image: str, replica: int | None) -> list[str]:
    """Return `docker run` for a container on this node that sees the working directory, `mounts` and all GPUs, and ends
    with the process. It gets the processes' settings, and the key of the endpoint that an evaluation asks, from the
    environment, by name. The limits are those that NVIDIA's images ask for. `stop_container` knows the form of its
    first words."""
    here = Path.cwd()
    volumes = [f"--volume={folder}:{folder}" for folder in seen_folders(config.sampler.mounts, here)]
    judge = config.pairwise_judges.get("evaluation.pairwise_judge")  # early stopping asks its own from `srlm run`
    keys = [] if judge is None or judge.api_key_variable is None else [judge.api_key_variable]
    names = [f"--env={name}" for name in (*PASSED_ON, *keys)]
    gpus = [] if config.sampler.device == "cpu" else ["--gpus=all"]
    limits = ["--ulimit", "memlock=-1", "--ulimit", "stack=67108864", "--ipc=host"]
    return [
        "docker", "run", "--name", container_name(config, replica), "--rm", "--init", *gpus, *limits, *names, *volumes,
        f"--workdir={here}", image,
    ]  # fmt: skip


def container_name(config: Config, replica: int | None) -> str:
    """Return the name of a replica's container: the same in every attempt, so that the next one finds what a killed
    one left, and another for each run folder."""
    folder = config.run.dir.absolute()
    run = re.sub(r"[^a-zA-Z0-9_.-]", "-", folder.name)
    return f"srlm-{run}-{hashlib.sha256(bytes(folder)).hexdigest()[:8]}-{'alone' if replica is None else replica}"


def stop_containers(config: Config) -> None:
    """Stop the containers of all replicas on this node, for a process that ended before it could do so itself."""
    if config.sampler.container is not None and not config.sampler.slurm:
        for replica in range(config.sampler_replicas):
            stop_container(container_here(config, config.sampler.container, replica))


def stop_container(command: object) -> None:
    """Stop the container of a command of `sampler_process` (`Popen.args`), and free its name; nothing happens for other
    commands, and where there is none. A container lives on when its docker client is killed, so this is to be called
    before a start, for what an earlier attempt left, and after the end. Prints why it could not."""
    match command:
        case ["docker", "run", "--name", str(name), *_]:
            for verb in (["stop"], ["rm", "--force"]):
                ended = subprocess.run(["docker", *verb, name], capture_output=True, text=True, check=False)
            if ended.returncode and "No such container" not in ended.stderr:
                print(f"docker rm --force {name}: {ended.stderr.strip()}. It may hold GPU memory", flush=True)


def srun_replica(config: Config, replica: int | None) -> list[str]:
    """Return srun for one replica, in its container (pyxis) if it has one. --exact and --mem=0: steps share nodes.
    When a task fails, the others are ended at once; when one has finished, they have 30 s."""
    sampler, devices = config.sampler, config.sampler.devices_per_replica
    mpi = sampler.traits.needs_mpi
    nodes, on_node = -(-devices // sampler.devices_per_node), min(devices, sampler.devices_per_node)
    tasks = devices if mpi else 1
    exclusive = config.launch.slurm.exclusive  # else the job has cores for its own GPUs alone
    of_job = sampler.devices_per_node if exclusive else min(sampler.num_devices, sampler.devices_per_node)
    cores = number_in(os.environ, "SLURM_CPUS_ON_NODE", default=1) * on_node // of_job
    argv = [
        "srun", "--exact", f"--nodes={nodes}", f"--ntasks={tasks}", f"--ntasks-per-node={-(-tasks // nodes)}",
        f"--cpus-per-task={max(1, cores // on_node if mpi else cores)}", "--mem=0", "--kill-on-bad-exit=1", "--wait=30",
        "--export=ALL",
    ]  # fmt: skip
    argv += [] if replica is None else [f"--relative={node_of(replica, config)}"]
    argv += [] if sampler.device == "cpu" else [gpu_request(config.launch.slurm, on_node)]
    argv += ["--mpi=pmix"] if mpi else []
    runtime = config.launch.slurm.container_runtime
    return [*argv, *in_container(runtime, sampler.container, sampler.mounts, Path.cwd(), sampler.device != "cpu")]


def node_of(replica: int, config: Config) -> int:
    """Return the place, in the allocation's list, of the first node that a replica is on; 0 where there is one."""
    return replica * config.sampler.devices_per_replica // config.sampler.devices_per_node


def devices_of(replica: int, config: Config, visible: str | None = None) -> dict[str, str]:
    """Return CUDA_VISIBLE_DEVICES of one of the replicas on this node, out of those that are `visible` to this process
    (its own value; None: all). Nothing under Slurm, where the step decides, and without GPUs. UserError where fewer are
    visible than the replicas need."""
    sampler = config.sampler
    if sampler.slurm or sampler.device == "cpu" or visible in HIDDEN:
        return {}
    first = replica * sampler.devices_per_replica
    last = first + sampler.devices_per_replica
    names = [str(number) for number in range(last)] if visible is None else visible.split(",")
    if visible is not None and len(names) < sampler.num_devices:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} has {len(names)} devices, and sampler.num_devices={sampler.num_devices}: "
            "name more, or lower sampler.num_devices"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[first:last])}
