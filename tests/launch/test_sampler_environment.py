"""The variables, containers and MPI launcher of processes that sample. docker is played by a script, as is the
launcher: neither has run here."""

import json
import os
import select
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from places import ROOT

from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.config.rules import problems
from srlm_mega.config.runtime import BackendTraits
from srlm_mega.errors import UserError
from srlm_mega.launch.child_process import environment
from srlm_mega.launch.sampler_environment import (
    LAUNCHER,
    container_name,
    node_of,
    sampler_process,
    sampler_variables,
    stop_container,
)

TOY = ROOT / "launch/configs/toy_cpu.yaml"
GPU = ("sampler.backend=trtllm_torch", "sampler.device=cuda")
# What only training is for: in the environment of `srlm run`, of its stages on CPUs, and of env.sh.
TRAINING = (
    "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS", "PYTHONWARNINGS", "PYTORCH_CUDA_ALLOC_CONF",
    "TORCHDYNAMO_DISABLE", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
)  # fmt: skip
USERS = {"HOME": "/home/u", "PATH": "/bin", "NCCL_IB_HCA": "mlx5"}


def config_of(*overrides: str) -> Config:
    return load_config(TOY, [*GPU, *overrides])


def split_on_one_node(number: int, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Config:
    """A backend that splits a model over GPUs by itself."""
    traits = BackendTraits(
        needs_gpu=True, needs_mpi=False, splits_model=True, quantizes=True, loads_engine=False, continuous=True
    )
    monkeypatch.setattr("srlm_mega.config.runtime.traits_of", lambda backend: traits)
    return config_of(f"sampler.tp_size={number}", *overrides)


@pytest.mark.parametrize("cpu", [True, False])
def test_a_sampler_has_nothing_that_is_for_training(cpu: bool) -> None:
    inherited = environment(USERS, threads=3, cpu=cpu) | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    made = sampler_variables(inherited, config_of("sampler.container=image"), 0)
    assert made == USERS | {
        "CUDA_VISIBLE_DEVICES": "0", "HF_HUB_OFFLINE": "1", "NCCL_DEBUG": "WARN", "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "TMPDIR": "/tmp",
        "TRITON_CACHE_DIR": f"/tmp/srlm-{os.getuid()}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"/tmp/srlm-{os.getuid()}/inductor",
    }  # fmt: skip
    assert sampler_variables(USERS, config_of("sampler.container=image"), 0) == made, "whoever starts it"


def test_a_value_that_is_not_ours_is_the_users() -> None:
    own = dict.fromkeys(("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), "garbage_collection_threshold:0.8")
    own |= {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "TORCHDYNAMO_DISABLE": "0", "NCCL_DEBUG": "INFO"}
    made = sampler_variables(own | {"OMP_NUM_THREADS": "7"}, config_of(), None)
    assert own.items() <= made.items()
    assert "OMP_NUM_THREADS" not in made, "the stage's own process has it from `srlm run`"


def test_threads_are_for_models_on_cpus() -> None:
    """A share for each of several replicas; the process that starts them needs no more."""
    on_cpus = load_config(TOY, ["launch.threads_per_process=null", "launch.cores_per_node=8", "sampler.num_devices=2"])
    threads = [sampler_variables({}, on_cpus, replica)["OMP_NUM_THREADS"] for replica in (None, 0, 1)]
    assert threads == ["4", "4", "4"]
    assert "CUDA_VISIBLE_DEVICES" not in sampler_variables({}, on_cpus, 1)


def test_devices_are_those_that_this_process_may_use() -> None:
    four = config_of("sampler.tp_size=2", "sampler.num_devices=4")

    def given(replica: int | None, config: Config = four, **inherited: str) -> str | None:
        return sampler_variables(inherited, config, replica).get("CUDA_VISIBLE_DEVICES")

    assert [given(0), given(1)] == ["0,1", "2,3"]
    assert given(1, CUDA_VISIBLE_DEVICES="3,5,6,GPU-8") == "6,GPU-8"
    assert given(None, CUDA_VISIBLE_DEVICES="3,5,6,7") == "3,5,6,7"
    with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES=3,5 has 2 devices, and sampler.num_devices=4"):
        given(0, CUDA_VISIBLE_DEVICES="3,5")
    auto = load_config(TOY, ["sampler.device=auto", "sampler.num_devices=2"])
    assert [given(1, auto, CUDA_VISIBLE_DEVICES=hidden) for hidden in ("", "-1")] == ["", "-1"]
    step = config_of("sampler.slurm=true", "sampler.num_devices=4")
    assert given(1, step, CUDA_VISIBLE_DEVICES="0,1") == "0,1", "srun replaces it"


def test_programs_are_found_in_the_samplers_environment(tmp_path: Path) -> None:
    """The MPI launcher, and the python3 that it calls."""
    own = config_of(f"sampler.python={tmp_path}/bin/python")
    assert sampler_variables({"PATH": "/bin"}, own, 0)["PATH"] == f"{tmp_path}/bin:/bin"
    assert sampler_variables({"PATH": "/bin"}, config_of("sampler.container=i"), 0)["PATH"] == "/bin"


def test_each_start_of_an_mpi_engine_has_an_address_of_its_own() -> None:
    step = config_of("sampler.slurm=true", "sampler.num_devices=2", "sampler.container=i")
    name = "TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR"
    found = [sampler_variables({name: "tcp://127.0.0.1:10012"}, step, replica)[name] for replica in (0, 1, 1)]
    assert len(set(found)) == 3 and all(address.startswith("ipc:///tmp/srlm-") for address in found)
    assert max(map(len, found)) < 100, "a socket's path has at most 107 bytes"
    assert name not in sampler_variables({}, config_of(), 0)


def test_a_replica_knows_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """TP 2 on nodes of 4; TP 8 x PP 2 on nodes of 8."""
    step = ("sampler.slurm=true", "sampler.container=i")
    small = config_of(*step, "sampler.tp_size=2", "sampler.num_devices=8", "sampler.devices_per_node=4")
    assert [node_of(replica, small) for replica in range(4)] == [0, 0, 1, 1]
    assert "--relative=1" in sampler_process(small, [], 2)
    large = config_of(*step, "sampler.tp_size=8", "sampler.pp_size=2", "sampler.num_devices=48")
    assert [node_of(replica, large) for replica in range(3)] == [0, 2, 4]
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "6")
    alone = sampler_process(large, [])
    assert not any(word.startswith("--relative") for word in alone) and "--wait=30" in alone


@pytest.mark.parametrize("overrides", [["sampler.tp_size=8"], ["sampler.tp_size=8", "sampler.pp_size=2"]])
def test_an_allocation_that_is_too_small_is_named(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    step = config_of("sampler.slurm=true", "sampler.container=i", "sampler.num_devices=48", *overrides)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "5")
    with pytest.raises(UserError, match=r"num_devices=48 are 6 nodes of 8 .* this allocation has 5: ask for more"):
        sampler_process(step, [], 0)


def test_an_engine_without_mpi_is_one_task_with_the_cores_of_all_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "96")
    step = ("sampler.slurm=true", "sampler.container=i", "sampler.num_devices=8")
    ranks = sampler_process(config_of("sampler.tp_size=4", *step), [], 1)
    assert {"--ntasks=4", "--cpus-per-task=12", "--gpus-per-node=4", "--mpi=pmix"} <= set(ranks)
    argv = sampler_process(split_on_one_node(4, monkeypatch, *step), ["replica", "r", "1"], 1)
    assert {"--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--cpus-per-task=48", "--gpus-per-node=4"} <= set(argv)
    assert argv[-4:] == ["srlm", "replica", "r", "1"] and not {"--mpi=pmix", "bash"} & set(argv)


def test_replicas_that_would_lie_across_nodes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"a node's 8 GPUs .* not divisible by a replica's TP \* PP = 3.* on two of them"
    ):
        config_of("sampler.slurm=true", "sampler.tp_size=3", "sampler.num_devices=12")
    assert problems(config_of("sampler.tp_size=3", "sampler.num_devices=6")) == [], "both on one node"
    with pytest.raises(UserError, match=r"over the GPUs of one node: TP \* PP is 16, sampler.devices_per_node 8"):
        split_on_one_node(16, monkeypatch, "sampler.slurm=true", "sampler.num_devices=16")


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `docker` that runs a container as a process that outlives its client; returns the file of its calls."""
    fake, calls = tmp_path / "bin/docker", tmp_path / "calls"
    fake.parent.mkdir()
    fake.write_text(
        f"""#!/bin/bash
echo "$*" >>{calls}
for name; do :; done
case $1 in
  run) name=$3; setsid sleep 600 & echo $! >{tmp_path}/$name.new; mv {tmp_path}/$name.new {tmp_path}/$name; wait ;;
  stop) [ -e {tmp_path}/$name ] && kill $(cat {tmp_path}/$name) && rm {tmp_path}/$name ;;
  rm) [ -e {tmp_path}/broken ] && echo "cannot connect to the daemon" >&2 && exit 1 ;;
esac || {{ echo "Error response from daemon: No such container: $name" >&2; exit 1; }}
"""
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    return calls


def test_a_container_whose_client_was_killed_is_stopped(
    docker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of("sampler.container=image")
    command = sampler_process(config, ["replica", "r", "0"], 0)
    pid_file = tmp_path / container_name(config, 0)
    with subprocess.Popen(command) as client:
        while not pid_file.exists():
            assert client.poll() is None
        container = int(pid_file.read_text())
        client.kill()
    ended = os.pidfd_open(container)  # it lives
    stop_container(client.args)
    assert not pid_file.exists() and select.select([ended], [], [], 60)[0], "it takes the signal when it comes to run"
    assert docker.read_text().splitlines()[1:] == [f"stop {pid_file.name}", f"rm --force {pid_file.name}"]
    stop_container(command)  # again, as before a start: there is none
    stop_container(["srun", "docker", "run"])
    assert len(docker.read_text().splitlines()) == 5 and capsys.readouterr().out == ""
    (tmp_path / "broken").touch()
    stop_container(command)
    assert f"docker rm --force {pid_file.name}: cannot connect to the daemon" in capsys.readouterr().out


def test_a_containers_name_and_limits() -> None:
    config = config_of("sampler.container=image", "sampler.num_devices=2", "run.dir=/runs/a run+1")
    names = [container_name(config, replica) for replica in (None, 0, 1)]
    assert len(set(names)) == 3 and names[1].startswith("srlm-a-run-1-") and names[1].endswith("-0")
    assert container_name(config_of("run.dir=/other/a run+1"), 0) != names[1], "two runs on one machine"
    words = " ".join(sampler_process(config, [], 1))
    assert words.startswith(f"docker run --name {names[2]} --rm --init --gpus=all ")
    assert " --ulimit memlock=-1 --ulimit stack=67108864 --ipc=host " in words
    assert all(f"--env={name}" in words for name in TRAINING), "a user's own value is passed on"
    assert "--gpus" not in " ".join(sampler_process(load_config(TOY, ["sampler.container=image"]), []))


def test_a_docker_container_is_given_the_key_of_its_judge_by_name() -> None:
    """An evaluation asks the endpoint from there; early stopping asks from the machine of `srlm run`."""
    judge = "{model: m, endpoint: https://host/v1, api_key_variable: %s}"
    asked = ("evaluation.pairwise=true", f"evaluation.pairwise_judge={judge % 'MY_KEY'}")
    words = sampler_process(config_of("sampler.container=image", *asked), [])
    assert "--env=MY_KEY" in words and words.index("--env=MY_KEY") < words.index("image")
    assert not any("KEY" in word for word in sampler_process(config_of("sampler.container=image"), []))


def test_a_sampler_in_apptainer() -> None:
    """Here, and as a step: no docker, no option of pyxis."""
    apptainer = ("launch.slurm.container_runtime=apptainer", "sampler.container=s.sif", "sampler.mounts=[/models]")
    inside = f"apptainer exec --nv --no-home --bind={Path.cwd()},/models --pwd={Path.cwd()} s.sif"
    here = sampler_process(config_of(*apptainer), ["replica"], 0)
    assert " ".join(here) == f"{inside} srlm replica"
    step = " ".join(sampler_process(config_of(*apptainer, "sampler.slurm=true"), ["replica"], 0))
    assert step.startswith("srun ") and step.endswith(f"{inside} bash -c {LAUNCHER} trtllm-llmapi-launch srlm replica")
    assert "--container" not in step


# Of TensorRT-LLM 1.1 and before: words are split, and a command that fails leaves the leader alive.
OLD = """#!/bin/bash
set -e
task_with_command="${@:1}"
( $task_with_command; kill $(cat "$FOLDER/leader") ) &
sleep 600 &
echo $! >"$FOLDER/leader"
wait $! || true
"""
# Newer ones end the leader in any case and return the command's code.
NEW = """#!/bin/bash
( "$@"; code=$?; kill $(cat "$FOLDER/leader"); exit $code ) &
command=$!
sleep 600 &
echo $! >"$FOLDER/leader"
wait $!
wait $command
"""
COMMAND = "import json, sys, time; time.sleep(0.5); print(json.dumps(sys.argv[2:])); sys.exit(int(sys.argv[1]))"


@pytest.mark.parametrize("text", [OLD, NEW], ids=["old", "new"])
@pytest.mark.parametrize("code", [0, 3])
def test_a_task_ends_with_its_command(tmp_path: Path, text: str, code: int) -> None:
    """Although the old launcher's leader lives on, which the end of the step ends: here, of the process group."""
    done, out = run_task(tmp_path, text, ["python3", "-c", COMMAND, str(code), "a b", "*", "q\"u$o'te"])
    assert done == code and json.loads(out) == ["a b", "*", "q\"u$o'te"]


def test_a_leader_that_ends_before_its_command_ends_the_task(tmp_path: Path) -> None:
    dies = '#!/bin/bash\n"$@" &\nexit 0\n'
    assert run_task(tmp_path, dies, ["sleep", "600"])[0] == 1
    assert run_task(tmp_path, dies.replace("exit 0", "exit 9"), ["sleep", "600"])[0] == 9
    assert run_task(tmp_path, None, ["true"])[0] == 127


def test_the_other_tasks_are_the_launchers_alone(tmp_path: Path) -> None:
    worker = '#!/bin/bash\n[ "$SLURM_PROCID" = 1 ] && echo "$1"\n'
    assert run_task(tmp_path, worker, ["a b"], SLURM_PROCID="1") == (0, "a b\n")
    ended = "#!/bin/bash\nkill -TERM $$\n"  # at the end of the step, before its task is told to end
    assert run_task(tmp_path, ended, ["a b"], SLURM_PROCID="1") == (0, "")
    assert run_task(tmp_path, "#!/bin/bash\nexit 7\n", ["a b"], SLURM_PROCID="1") == (7, "")


def run_task(folder: Path, launcher: str | None, command: list[str], **settings: str) -> tuple[int, str]:
    """A task's exit code and output; what it leaves behind is killed."""
    path, output = folder / "trtllm-llmapi-launch", folder / "output"
    path.unlink(missing_ok=True)
    if launcher is not None:
        path.write_text(launcher)
        path.chmod(0o755)
    variables = os.environ | {"FOLDER": str(folder), "SLURM_PROCID": "0"} | settings
    with output.open("w") as out:
        task = subprocess.Popen(
            ["bash", "-c", LAUNCHER, str(path), *command], env=variables, stdout=out, start_new_session=True
        )
        code = task.wait()
    with suppress(ProcessLookupError):
        os.killpg(task.pid, signal.SIGKILL)
    return code, output.read_text()
