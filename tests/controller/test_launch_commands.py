"""Command lines over several nodes, and the shell scripts that must say the same as the Python."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from places import ROOT

from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.config.launch import ContainerRuntime, LaunchConfig
from srlm_mega.controller.loop import run_loop
from srlm_mega.controller.stage_process import StageProcess, stage_command, started
from srlm_mega.errors import CannotContinue, UserError
from srlm_mega.launch import ranks
from srlm_mega.launch.child_process import adapt_to_node, environment, srlm_command
from srlm_mega.launch.listening import free_port, ports_of
from srlm_mega.launch.ranks import (
    TASK,
    Allocation,
    JobStep,
    Rendezvous,
    Start,
    check_resolves,
    current_allocation,
    process_in_step,
    pyxis,
    ranks_in_step,
    ranks_on_node,
)
from srlm_mega.run.plan import find_stage
from srlm_mega.run.run_dir import RunDir

LAUNCH = Path(ranks.__file__).parent
TOY = ROOT / "launch/configs/toy_cpu.yaml"
TWO_NODES = LaunchConfig(nodes=2, processes_per_node=8)
RENDEZVOUS = Rendezvous(host="n1", port=10_005, id="5-0")
STEP = JobStep(hosts=("n1", "n2"), logs=Path("/run/slurm/5/attempt_0/100%"), container=None, mounts=())


def test_srlm_starts_as_a_module_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare machine's Python, with the package on PYTHONPATH, has no commands beside it."""
    module = [sys.executable, "-P", "-m", "srlm_mega.cli.start"]
    done = subprocess.run([*module, "config", "show", "toy_cpu"], capture_output=True, text=True)
    assert done.returncode == 0 and "num_layers" in done.stdout, done.stderr
    assert srlm_command() == [str(Path(sys.executable).parent / "srlm")]
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert srlm_command() == [str(tmp_path / "python"), "-P", "-m", "srlm_mega.cli.start"]


def test_static_and_c10d() -> None:
    assert ranks_on_node(["/bin/srlm"], ["srlm", "stage"], TWO_NODES, RENDEZVOUS, 1) == [
        "/bin/srlm", "torchrun", "--node-rank=1", "--nnodes=2", "--nproc-per-node=8", "--master-addr=n1",
        "--master-port=10005", "--max-restarts=0", "--no-python", "srlm", "stage",
    ]  # fmt: skip
    dynamic = ranks_on_node(["srlm"], ["srlm"], TWO_NODES.model_copy(update={"rendezvous": "c10d"}), RENDEZVOUS, 0)
    assert dynamic[:2] == ["srlm", "torchrun"]
    assert {"--rdzv-backend=c10d", "--rdzv-endpoint=n1:10005", "--rdzv-id=5-0", "--max-restarts=0"} <= set(dynamic)
    assert not any(word.startswith("--master") for word in dynamic)


def test_a_step_has_one_task_per_node() -> None:
    argv = ranks_in_step(
        Path("/bin"), ["/bin/srlm", "stage", "a b"], TWO_NODES, RENDEZVOUS, STEP, Path("/run/config.yaml")
    )
    assert argv[0] == "srun" and argv[-4:] == ["--no-python", "/bin/srlm", "stage", "a b"]
    assert {
        "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n1,n2", "--kill-on-bad-exit=1", "--wait=60",
        "--export=ALL", "--output=/run/slurm/5/attempt_0/100%%/%N.log",
    } <= set(argv)  # fmt: skip
    assert not any(word.startswith("--container") for word in argv)
    boxed = process_in_step(["srlm", "stage"], JobStep(("n1", "n2"), Path("/l"), "image", (Path("/models"),)))
    assert {"--nodes=1", "--nodelist=n1", "--container-image=image", "--no-container-mount-home"} <= set(boxed)
    assert f"--container-mounts={Path.cwd()}:{Path.cwd()},/models:/models" in boxed


@pytest.mark.parametrize("program", ["apptainer", "singularity"])
def test_a_step_in_a_container_of_another_program(program: ContainerRuntime) -> None:
    """It is a command in the step, and not options of srun; GPUs are for steps that use them."""
    step = replace(STEP, container="train.sif", mounts=(Path("/models"),), runtime=program)
    argv = ranks_in_step(None, ["srlm", "stage"], TWO_NODES, RENDEZVOUS, step, Path("/run/config.yaml"))
    inside = [program, "exec", "--nv", "--no-home", f"--bind={Path.cwd()},/models", f"--pwd={Path.cwd()}", "train.sif"]
    at = argv.index(program)
    assert argv[at : at + len(inside) + 2] == [*inside, "bash", "-c"]
    assert all(word.startswith("--") for word in argv[1:at]) and "--kill-on-bad-exit=1" in argv[1:at]
    assert not any(word.startswith("--container") for word in argv)
    assert "--nv" not in process_in_step(["srlm"], replace(step, gpus=False))
    with pytest.raises(UserError, match="/data/a,b: a container cannot"):
        process_in_step(["srlm"], replace(step, mounts=(Path("/data/a,b"),)))


@pytest.mark.parametrize("name", ["a,b", "a:b"])
def test_a_folder_that_pyxis_would_misread_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"/data/{name}: .*container"):
        pyxis("image", (Path("/data", name),), Path("/work"))
    with pytest.raises(ValueError, match=f"/data/{name}: .*container"):
        pyxis("image", (), Path("/data", name))
    assert pyxis(None, (Path("/data", name),), Path("/work")) == []


def test_a_nodes_task_knows_its_own_number(tmp_path: Path) -> None:
    """What bash makes of it on the node; and a node that does not see the run folder says so."""
    seen = tmp_path / "a file"
    seen.touch()
    argv = ["bash", "-c", TASK, "task", str(seen), "echo", "--nnodes=2", "a  b"]
    settings = {"SLURM_NODEID": "1", "PATH": os.environ["PATH"]}
    assert (
        subprocess.run(argv, env=settings, capture_output=True, text=True).stdout
        == "torchrun --node-rank=1 --nnodes=2 a  b\n"
    )
    seen.unlink()
    done = subprocess.run(argv, env=settings, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert f"node {socket.gethostname()} does not see {seen}" in done.stderr and "all nodes share" in done.stderr


def test_ports_stay_out_of_the_way() -> None:
    """Linux gives 32768 and above to outgoing connections."""
    whole = LaunchConfig().port_range
    ports = [ports_of(job, whole)[0] for job in (0, 1, 19_999, 20_000, 123_456_789)]
    assert ports == [10_000, 10_001, 29_999, 10_000, 26_789]
    assert all(
        len(set(ports_of(job, whole))) == 16 and max(ports_of(job, whole)) < 32_768 for job in range(0, 20_000, 7)
    )
    assert sorted(ports_of(12, (4000, 4003))) == [4000, 4001, 4002, 4003] and len(ports_of(5, (4000, 4001))) == 2


def test_a_port_that_is_taken_is_passed_by() -> None:
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        taken = [int(one.getsockname()[1]) for one in (first, second)]
        with socket.create_server(("127.0.0.1", 0)) as third:
            free = int(third.getsockname()[1])
        assert free_port("127.0.0.1", [*taken, free]) == free
        with pytest.raises(
            UserError, match=rf"ports {taken[0]}, {taken[1]} on 127\.0\.0\.1 are taken .*launch\.port_range"
        ):
            free_port("127.0.0.1", taken)


@pytest.mark.parametrize("ports", [[29999, 10000], [80, 90], [4000, 4000], [65000, 70000], [4000]])
def test_a_range_without_two_ports_is_refused(ports: list[int]) -> None:
    with pytest.raises(UserError, match=r"launch\.port_range"):
        load_config(TOY, [f"launch.port_range={ports}"])


def test_the_shell_and_python_agree_on_the_environment() -> None:
    """Both sets of variables, and that a user's own NCCL_DEBUG stays."""
    users = [
        {},
        {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "64"},
        {"TMPDIR": "/scratch/me", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
        {"TMPDIR": "/scratch/me", "SLURM_TMPDIR": "/local/job 5", "PYTORCH_ALLOC_CONF": "max_split_size_mb:64"},
        {"SLURM_TMPDIR": "/local/5", "TRITON_CACHE_DIR": "/mine", "TORCHINDUCTOR_CACHE_DIR": "/also mine"},
    ]
    for own in users:
        script = (
            f'source "{LAUNCH}/env.sh" && "{sys.executable}" -c "import json, os; print(json.dumps(dict(os.environ)))"'
        )
        done = subprocess.run(["bash", "-c", script], env=own, capture_output=True, text=True, check=True)
        shell = {name: value for name, value in json.loads(done.stdout).items() if name not in ("PWD", "SHLVL", "_")}
        shell.pop("LC_CTYPE", None)  # Python's own doing
        assert shell == environment(own, threads=1, cpu=False)
    assert environment({"NCCL_DEBUG": "INFO"}, 1, cpu=False)["NCCL_DEBUG"] == "INFO"


def test_compiled_kernels_are_on_the_nodes_own_disk() -> None:
    """64 ranks that compile into one shared home lose files to each other. A user's own folder is taken."""
    places = [
        environment(own, 1, cpu=False)["TRITON_CACHE_DIR"]
        for own in ({}, {"TMPDIR": "/t"}, {"TMPDIR": "/t", "SLURM_TMPDIR": "/s"}, {"TRITON_CACHE_DIR": "/m"})
    ]
    user = f"srlm-{os.getuid()}"
    assert places == [f"/tmp/{user}/triton", f"/t/{user}/triton", f"/s/{user}/triton", "/m"]
    assert environment({"SLURM_TMPDIR": "/s"}, 1, cpu=False)["TORCHINDUCTOR_CACHE_DIR"] == f"/s/{user}/inductor"
    assert [environment(own, 1, cpu=False)["TMPDIR"] for own in ({}, {"SLURM_TMPDIR": "/s"}, {"TMPDIR": "/t"})] == [
        "/tmp", "/s", "/t",
    ]  # fmt: skip


def test_a_node_without_the_folder_takes_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container that was not given it, or where it is another user's: its kernels would be loaded."""
    good = environment({"TMPDIR": str(tmp_path)}, 1, cpu=False)
    adapt_to_node(good)
    root = tmp_path / f"srlm-{os.getuid()}"
    assert good["TRITON_CACHE_DIR"] == str(root / "triton") and root.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    bad = environment({"SLURM_TMPDIR": str(tmp_path / "file"), "TORCHINDUCTOR_CACHE_DIR": "/mine"}, 1, cpu=False)
    adapt_to_node(bad)
    assert Path(bad["TRITON_CACHE_DIR"]).parent.is_dir() and bad["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    assert str(tmp_path / "file") not in bad["TRITON_CACHE_DIR"]
    assert good["TMPDIR"] == str(tmp_path) and Path(bad["TMPDIR"]).is_dir(), "compilers write there"
    monkeypatch.setattr("os.getuid", lambda: 12345)
    others = environment({"TMPDIR": str(tmp_path)}, 1, cpu=False)
    (tmp_path / "srlm-12345").mkdir()
    adapt_to_node(others)
    assert not others["TRITON_CACHE_DIR"].startswith(f"{tmp_path}/srlm-12345/")


@pytest.mark.parametrize(
    ("torch", "names"),
    [
        ("2.8.0+cu128", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"]),
        ("2.9.0", ["PYTORCH_ALLOC_CONF"]),
        ("2.10.0a0+b558c98", ["PYTORCH_ALLOC_CONF"]),
    ],
)
def test_the_allocators_settings_have_the_name_that_torch_reads(
    torch: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srlm_mega.launch.child_process.version", lambda package: torch)
    made = environment({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, 1, cpu=False)
    adapt_to_node(made)
    assert {name: made[name] for name in made if "ALLOC_CONF" in name} == dict.fromkeys(names, "max_split_size_mb:64")


def test_each_node_takes_the_interface_that_it_has() -> None:
    """The names differ from node to node; NCCL's pattern of the user's own stays."""
    ours = {"SRLM_NETWORK_INTERFACES": "ib77 lo", "NCCL_SOCKET_IFNAME": "ib77", "GLOO_SOCKET_IFNAME": "ib77"}
    variables = dict(ours)
    adapt_to_node(variables)
    assert (variables["NCCL_SOCKET_IFNAME"], variables["GLOO_SOCKET_IFNAME"]) == ("lo", "lo")
    variables = ours | {"NCCL_SOCKET_IFNAME": "^docker0"}
    adapt_to_node(variables)
    assert (variables["NCCL_SOCKET_IFNAME"], variables["GLOO_SOCKET_IFNAME"]) == ("^docker0", "lo")
    with pytest.raises(UserError, match=rf"{socket.gethostname()} has no interface ib77 or ib78 .*, but .*lo"):
        adapt_to_node(ours | {"SRLM_NETWORK_INTERFACES": "ib77 ib78"})
    variables = {"GLOO_SOCKET_IFNAME": "ib77"}
    adapt_to_node(variables)
    assert variables["GLOO_SOCKET_IFNAME"] == "ib77" and "NCCL_SOCKET_IFNAME" not in variables


def multinode(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """The script for clusters without Slurm, with an echo for torchrun."""
    settings = {"PATH": os.environ["PATH"], "TORCHRUN": "echo"}
    return subprocess.run(
        [LAUNCH / "torchrun_multinode.sh", *arguments], env=settings, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_the_script_without_slurm_says_what_python_says(rendezvous: str) -> None:
    options = ["--nnodes=2", "--nproc-per-node=8", "--node-rank=1", "--master-addr=localhost", "--master-port=10005"]
    done = multinode(*options, f"--rendezvous={rendezvous}", "env", "stage", "a b")
    launch = TWO_NODES.model_copy(update={"rendezvous": rendezvous})
    argv = ranks_on_node(["srlm"], ["env", "stage", "a b"], launch, Rendezvous("localhost", 10_005, "srlm"), 1)
    assert done.stdout.split() == " ".join(argv[2:]).split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["srlm"], "give --nnodes=N"),
        (["--nnodes=2", "--nproc-per-node=1", "--node-rank=2", "--master-addr=localhost", "x"], "the last one is 1"),
        (["--nnodes=2", "--nproc-per-node=1", "--node-rank=0", "--master-addr=localhost"], "give a command"),
        (["--nodes=2"], "unknown option --nodes=2"),
        (["--nnodes", "2"], "unknown option --nnodes; options are written --name=value"),
        (["--nnodes=two", "--nproc-per-node=1", "--node-rank=0", "--master-addr=localhost", "ls"], "--nnodes=two"),
        (["--nnodes=2", "--nproc-per-node=0", "--node-rank=0", "--master-addr=localhost", "ls"], "--nproc-per-node=0"),
        (["--nnodes=2", "--nproc-per-node=1", "--node-rank=-1", "--master-addr=localhost", "ls"], "--node-rank=-1"),
        (["--nnodes=2", "--nproc-per-node=1", "--node-rank=08", "--master-addr=localhost", "ls"], "--node-rank=08"),
        (
            ["--nnodes=2", "--nproc-per-node=1", "--node-rank=0", "--master-addr=localhost", "--threads=x"],
            "--threads=x",
        ),
        (["--nnodes=2", "--nproc-per-node=1", "--node-rank=0", "--master-addr=localhost", "--master-port=1e4"], "1e4"),
        (
            ["--nnodes=2", "--nproc-per-node=1", "--node-rank=0", "--master-addr=localhost", "no-such"],
            "no-such: no such",
        ),
        (
            ["--nnodes=2", "--nproc-per-node=1", "--node-rank=0", "--master-addr=no.such.invalid", "x"],
            "no.such.invalid does not resolve",
        ),
    ],
)
def test_the_script_without_slurm_refuses(arguments: list[str], message: str) -> None:
    done = multinode(*arguments)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""


def test_names_that_do_not_resolve() -> None:
    check_resolves("localhost")
    with pytest.raises(ValueError, match=r"no\.such\.invalid does not resolve on .*every node needs its address"):
        check_resolves("no.such.invalid")


def test_outside_of_an_allocation() -> None:
    with pytest.raises(ValueError, match=r"not a Slurm allocation.*srlm launch slurm"):
        current_allocation({})


def test_threads_of_the_script_without_slurm(tmp_path: Path) -> None:
    options = ["--nnodes=1", "--nproc-per-node=1", "--node-rank=0", "--master-addr=localhost"]
    fake = tmp_path / "torchrun"
    fake.write_text("#!/bin/sh\necho $OMP_NUM_THREADS\n")
    fake.chmod(0o755)
    settings = {"PATH": os.environ["PATH"], "TORCHRUN": str(fake)}
    for more, wanted in (([], "1"), (["--threads=4"], "4")):
        argv = [LAUNCH / "torchrun_multinode.sh", *options, *more, "env"]
        done = subprocess.run(argv, env=settings, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == wanted


def two_nodes(*overrides: str) -> Config:
    return load_config(TOY, ["launch.nodes=2", "launch.processes_per_node=1", *overrides])


def test_several_nodes_without_slurm_are_explained(tmp_path: Path) -> None:
    """Line by line what to start where; what needs one process only is made before."""
    with pytest.raises(CannotContinue) as stopped:
        stage_command([find_stage(two_nodes(), "M1")], two_nodes(), RunDir(tmp_path))
    lines = str(stopped.value).splitlines()
    assert lines[0].startswith("M1 takes launch.nodes=2") and "srlm launch slurm" in lines[0]
    for rank in (0, 1):
        assert f"--nnodes=2 --nproc-per-node=1 --node-rank={rank} --master-addr=FIRST_NODE" in lines[rank + 1]
        assert lines[rank + 1].endswith(f"srlm stage {tmp_path} M1") and "torchrun_multinode.sh" in lines[rank + 1]


def test_training_is_a_step_of_the_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first launch.nodes nodes; other stages stay here, unless training has a container."""
    here = Allocation(job=7, attempt=2, hosts=("localhost", "n2", "n3"))
    monkeypatch.setattr("srlm_mega.launch.ranks.current_allocation", lambda variables: here)
    config, run = two_nodes("launch.launcher=slurm"), RunDir(tmp_path / "run")
    start = stage_command([find_stage(config, "round_1/reference")], config, run)
    assert start.logs == run.root / "slurm/7/attempt_2/round_1-reference"
    assert {"--nodelist=localhost,n2", "--master-addr=localhost", "--master-port=10007"} <= set(start.argv)
    assert stage_command([find_stage(config, "seed")], config, run).argv[1:3] == ["stage", str(run.root)]
    boxed = two_nodes("launch.launcher=slurm", "launch.slurm.container=image")
    start = stage_command([find_stage(boxed, "seed")], boxed, run)
    assert start.argv[0] == "srun" and start.argv[-4:] == ["srlm", "stage", str(run.root), "seed"]
    with pytest.raises(UserError, match="a:b: a container cannot be given"):
        stage_command([find_stage(boxed, "M1")], boxed, RunDir(tmp_path / "a:b"))
    with pytest.raises(UserError, match=r"launch\.nodes=4, but job 7 has 3: localhost, n2, n3"):
        four = load_config(TOY, ["launch.launcher=slurm", "launch.nodes=4"])
        stage_command([find_stage(four, "M1")], four, run)


def test_srlm_run_refuses_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it makes anything."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    config = load_config(TOY, ["launch.launcher=slurm", f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match="not a Slurm allocation"):
        run_loop(config, RunDir(config.run.dir), (), display=None)  # type: ignore[arg-type]
    assert not config.run.dir.exists()


def test_an_environment_that_cannot_be_entered_is_named_before_the_training(tmp_path: Path) -> None:
    run, python = RunDir(tmp_path / "run"), tmp_path / "python"
    python.touch()
    config = load_config(TOY, [f"sampler.python={python}", f"run.dir={run.root}"])
    with pytest.raises(UserError, match=r"sampler\.python .*there is no srlm next to it"):
        run_loop(config, run, (), display=None)  # type: ignore[arg-type]
    assert not run.config_file.exists() and run.manifest("seed") is None


def test_the_end_of_what_was_printed(tmp_path: Path) -> None:
    """Of every node; without torchrun's report, which would hide it."""
    log, nodes = tmp_path / "M1.log", tmp_path / "M1"
    nodes.mkdir()
    log.write_text("earlier attempt\nsrun: error: n2: task 1: Killed\n")
    report = "E0101 torch/distributed/elastic/multiprocessing/api.py:1002] failed\n" + "Traceback\n" * 40
    (nodes / "n1.log").write_text("step 1\n")
    (nodes / "n2.log").write_text(f"RuntimeError: no ib7\n{report}")
    with subprocess.Popen(["true"]) as process:
        end = StageProcess(process, log, len("earlier attempt\n"), nodes).log_tail()
    assert end.splitlines() == [
        f"The end of {log}:", "srun: error: n2: task 1: Killed",
        f"The end of {nodes / 'n1.log'}:", "step 1",
        f"The end of {nodes / 'n2.log'}:", "RuntimeError: no ib7",
    ]  # fmt: skip


def test_a_stage_killed_as_it_closes_leaves_no_files_of_replicas(tmp_path: Path) -> None:
    """Its outputs are finished, so nothing is made again, and no later stage would remove them."""
    run = RunDir(tmp_path / "run")
    script = 'mkdir "$0"; touch "$0/heartbeat"; kill -9 $$'
    start = Start(["sh", "-c", script, str(run.replicas)])
    with started(start, "round_1/prompts", load_config(TOY), run, as_ranks=False) as process:
        assert process.popen.wait() == -9 and (run.replicas / "heartbeat").exists()
    assert not run.replicas.exists()


def test_hosts_come_from_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "scontrol"
    fake.write_text("#!/bin/sh\nprintf 'n1\\nn2\\n'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    variables = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_RESTART_COUNT": "3"}
    assert current_allocation(variables) == Allocation(12, 3, ("n1", "n2"))
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        with pytest.raises(UserError, match=f"{name} must be a number, got 'x'"):
            current_allocation(variables | {name: "x"})
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"this is Slurm job 12, and scontrol, .* is not on PATH: .*module purge"):
        current_allocation(variables)
