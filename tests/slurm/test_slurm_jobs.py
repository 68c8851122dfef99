"""The shipped jobs on a real Slurm cluster of this machine: trained, preempted, killed, requeued, refused.

What the preflight finds is played by a script in its place: here it is what a job makes of it.
"""

import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from cluster import Cluster, all_idle, text
from places import ROOT

from srlm_mega.launch.listening import ports_of
from srlm_mega.run.run_dir import RunDir

pytestmark = [pytest.mark.extra, pytest.mark.timing]
SRLM = Path(sys.executable).parent / "srlm"
LONG = 600.0  # seconds for what takes 30 on an idle machine
TINY = [
    "pretrain=null",
    "model.hidden_size=16",
    "model.ffn_hidden_size=32",
    "seed_data.num_documents=40",
    "seed_data.num_ift=40",
    "seed_data.num_eft=40",
    "seed_data.num_eft_eval=4",
    "seed_data.num_validation=4",
    "sft.train_iters=60",
    "sft.packed_sequence_size=null",
    "sft.micro_batch_size=2",
    "sft.global_batch_size=2",
    "trainer.save_interval=10",
    "launch.nodes=2",
    "launch.processes_per_node=1",
]


@pytest.fixture(scope="module")
def nodes_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What launch.slurm.python names. The `srlm` beside it has the script `preflight` play the preflight."""
    folder = tmp_path_factory.mktemp("nodes bin")  # with a space
    wrapper = folder / "srlm"
    wrapper.write_text(
        '#!/bin/bash\nif [[ "$1 $2" == "launch preflight" ]]; then\n'
        f'  [[ ! -x "{folder}/preflight" ]] || exec "{folder}/preflight" "$@"\n  exit 0\nfi\nexec "{SRLM}" "$@"\n'
    )
    wrapper.chmod(0o755)
    return folder / "python"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with seed data and M0."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    argv = [SRLM, "run", ROOT / "launch/configs/toy_cpu.yaml", *TINY, f"run.dir={folder}"]
    subprocess.run([*argv, "launch.nodes=1", "launch.processes_per_node=2", "--only=seed", "--only=M0"], check=True)
    return folder


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> RunDir:
    """A copy of it."""
    return RunDir(Path(shutil.copytree(begun, tmp_path / "a run")))


@pytest.fixture(scope="module")
def uninterrupted(slurm: Cluster, begun: Path, nodes_python: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run whose M1 was trained on two nodes in one go."""
    made = RunDir(Path(shutil.copytree(begun, tmp_path_factory.mktemp("uninterrupted") / "run")))
    comment = """launch.slurm.sbatch_options=["--comment=it's \\"two\\" words"]"""
    job = slurm.finished(train(slurm, made, nodes_python, comment), LONG)
    assert job.state == "COMPLETED" and job.restarts == 0, said(made, slurm)
    assert """Comment=it's "two" words""" in slurm.said("scontrol", "show", "job", str(job.id))
    return made


def train(slurm: Cluster, run: RunDir, nodes_python: Path, *overrides: str) -> int:
    """Submit train.sbatch for M1 as a user does; the job's number."""
    played = f"launch.slurm.python='{nodes_python}'"
    return submit(slurm, run, *TINY, played, *overrides, "--template=train", "--stage=M1")


def submit(slurm: Cluster, run: RunDir, *arguments: str) -> int:
    places = [f"run.dir='{run.root}'", *carried(slurm)]
    command = ["launch", "slurm", "--submit", ROOT / "launch/configs/toy_cpu.yaml", *places, *arguments]
    return int(slurm.said(SRLM, *command).split()[1].rstrip(":"))


def carried(slurm: Cluster) -> list[str]:
    """Where jobs find the code under test: their environment is clean."""
    path = slurm.environment().get("PYTHONPATH")
    return [] if path is None else [f"launch.slurm.environment.PYTHONPATH={path}"]


def said(run: RunDir, slurm: Cluster) -> str:
    """All that the jobs of a run printed, for a failed test."""
    logs = sorted([*run.jobs.rglob("*.log"), *(run.root / "logs").glob("*.log")])
    return "\n".join([*(f"--- {path}\n{text(path)[-3000:]}" for path in logs), slurm.trouble()])


def printed(run: RunDir, job: int) -> str:
    """What the job's script printed, all attempts."""
    return text(run.jobs / f"{job}.log")


def has_step(run: RunDir) -> bool:
    """Whether M1 was saved once."""
    return any(run.partial("M1").glob("megatron/iter_*/files.json"))


def weights(run: RunDir, model: str = "M1") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.weights(model).glob("*.safetensors")}


def a_rank(run: RunDir) -> psutil.Process:
    """A process that trains in this run."""

    def trains(process: psutil.Process) -> bool:
        argv = process.info["cmdline"] or []
        return argv[1:4] == [str(SRLM), "stage", str(run.root)]

    return next(process for process in psutil.process_iter(["cmdline"]) if trains(process))


def when(slurm: Cluster, run: RunDir, what: str, so: Callable[[], bool]) -> None:
    """Wait in the middle of a job."""
    try:
        slurm.wait(what, so, LONG)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{said(run, slurm)}") from None


def test_training_on_two_nodes(slurm: Cluster, uninterrupted: RunDir) -> None:
    manifest = uninterrupted.manifest("M1")
    assert manifest is not None and manifest.counts["steps"] == 60, said(uninterrupted, slurm)
    assert manifest.layout["launch.nodes"] == 2
    (attempt,) = uninterrupted.jobs.glob("*/attempt_0")
    assert sorted(path.name for path in (attempt / "M1").iterdir()) == ["n1.log", "n2.log"], "a file per node"
    assert weights(uninterrupted) != weights(uninterrupted, "M0"), "the comparisons below can fail"


def test_a_warned_job_saves_and_comes_back_to_the_same_weights(
    slurm: Cluster, run: RunDir, nodes_python: Path, uninterrupted: RunDir
) -> None:
    job = train(slurm, run, nodes_python)
    when(slurm, run, "the first checkpoint", lambda: has_step(run))
    rank = a_rank(run)
    rank.send_signal(signal.SIGSTOP)  # so that training is not over before the signal has come through
    try:
        assert run.manifest("M1") is None
        slurm.said("scancel", "--batch", "--signal=USR1", str(job))
        when(slurm, run, "that the job passes the signal on", run.stop_file.exists)
    finally:
        rank.send_signal(signal.SIGCONT)
    ended = slurm.finished(job, LONG)
    assert ended.state == "COMPLETED" and ended.restarts == 1, said(run, slurm)
    assert "stopped on demand. Queued again" in printed(run, job), printed(run, job)
    assert weights(run) == weights(uninterrupted)


def test_a_killed_rank(slurm: Cluster, run: RunDir, nodes_python: Path, uninterrupted: RunDir) -> None:
    """Its node's agent ends, srun ends the others; the job had made progress, so it queues itself again."""
    job = train(slurm, run, nodes_python)
    when(slurm, run, "the first checkpoint", lambda: has_step(run))
    a_rank(run).kill()
    ended = slurm.finished(job, LONG)
    assert ended.state == "COMPLETED" and ended.restarts == 1, said(run, slurm)
    assert "and had made progress. Queued again" in printed(run, job), printed(run, job)
    assert weights(run) == weights(uninterrupted)


def test_a_node_that_goes_down(slurm: Cluster, run: RunDir, nodes_python: Path, uninterrupted: RunDir) -> None:
    """Slurm queues the job again by itself; it goes on elsewhere."""
    job = train(slurm, run, nodes_python)
    when(slurm, run, "the first checkpoint", lambda: has_step(run))
    slurm.said("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    try:
        ended = slurm.finished(job, LONG)
    finally:
        slurm.said("scontrol", "update", "nodename=n2", "state=resume")
    assert ended.state == "COMPLETED" and ended.restarts == 1 and ended.nodes == "n[1,3]", said(run, slurm)
    assert weights(run) == weights(uninterrupted)


def test_a_cancelled_job_stays_cancelled(slurm: Cluster, run: RunDir, nodes_python: Path) -> None:
    job = train(slurm, run, nodes_python)
    when(slurm, run, "the first checkpoint", lambda: has_step(run))
    slurm.said("scancel", str(job))
    assert slurm.finished(job).state == "CANCELLED"
    slurm.wait("that its nodes are free", lambda: all_idle(slurm))
    assert slurm.job(job).state == "CANCELLED" and "Queued again" not in printed(run, job), said(run, slurm)


def test_a_job_that_fails_without_progress_ends(slurm: Cluster, run: RunDir, nodes_python: Path) -> None:
    """A Python that does not even start: it would not the next time."""
    job = slurm.finished(train(slurm, run, nodes_python, "launch.slurm.environment.PYTHONHOME=/nowhere"), LONG)
    assert job.state == "FAILED" and job.restarts == 0, said(run, slurm)
    assert "made no progress" in printed(run, job.id), printed(run, job.id)


PREFLIGHT = """\
#!/bin/bash
out=${@: -1}
mkdir -p "$out"
echo "$CUDA_VISIBLE_DEVICES" >"$out/devices.$(hostname)"
[[ $(hostname) == n1 ]] || exit 0
echo "n1: a fan is broken: replace it" >&2
[[ ! -e BLAME ]] || echo n1 >>"$out/bad_nodes"
exit 2
"""


def test_a_failed_preflight(slurm: Cluster, run: RunDir, nodes_python: Path) -> None:
    """The node it blames is left out from then on; when it blames none, the job ends. The work is bench.sbatch."""
    script, blame = nodes_python.with_name("preflight"), run.root / "blame"
    script.write_text(PREFLIGHT.replace("BLAME", shlex.quote(str(blame))))
    script.chmod(0o755)
    bench = [*TINY, f"launch.slurm.python='{nodes_python}'", "--template=bench"]
    try:
        refused = slurm.finished(submit(slurm, run, *bench))
        assert refused.state == "FAILED" and refused.restarts == 0, said(run, slurm)
        assert "no node is to blame" in printed(run, refused.id)
        blame.touch()
        job = submit(slurm, run, *bench, "trainer.device=auto")
        ended = slurm.finished(job, LONG)
    finally:
        script.unlink()
    assert ended.state == "COMPLETED" and ended.restarts == 1 and ended.nodes == "n[2-3]", said(run, slurm)
    assert "a fan is broken" in printed(run, job) and "Queued again without n1" in printed(run, job)
    first, second = (run.jobs / str(job) / f"attempt_{number}" for number in (0, 1))
    assert text(first / "preflight/devices.n2") == "0\n", "one GPU for one process per node"
    assert (second / "bench.json").is_file(), said(run, slurm)


PORTS = (41_000, 41_002)
HOLDER = """\
import socket, sys
listener = socket.create_server(("", int(sys.argv[1])))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_whole_round_in_one_job(slurm: Cluster, tmp_path: Path) -> None:
    """run.sbatch: the real preflight, training, and sampling by two replicas, as steps of one allocation, although the
    port that the nodes try first is another's on the first. Its judge is random, as no model this small can judge."""
    prompts = tmp_path / "prompts.jsonl"
    wording = "list {} animals upper open sure close thanks"
    prompts.write_text("".join(f'{{"text": "{wording.format(number)}"}}\n' for number in (2, 3, 4, 5)))
    run = RunDir(tmp_path / "run")
    job = submit(
        slurm, run, *TINY, "run.rounds=1", "sft.train_iters=2", "dpo.train_iters=2",
        "dpo.packed_sequence_size=null", "dpo.micro_batch_size=2", "dpo.global_batch_size=2",
        "prompts.generator=file", f"prompts.path={prompts}", "prompts.per_round=4", "candidates.n=16",
        "candidates.max_new_tokens=32", "judge.backend=random", "judge.max_new_tokens=4",
        "evaluation.judge_replicates=1", "sampler.shard_size=1",
        "sampler.slurm=true", "sampler.num_devices=2", "sampler.devices_per_node=1",
        'launch.slurm.sbatch_options=["--hold", "--nodelist=n[1-2]"]', f"launch.port_range={list(PORTS)}",
        "launch.preflight.report_seconds=100", "launch.preflight.allreduce_seconds=200",  # a busy machine
    )  # fmt: skip
    holder = slurm.nodes[0].command([sys.executable, "-c", HOLDER, str(ports_of(job, PORTS)[0])])
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as held:
        assert held.stdout is not None and held.stdout.readline() == b"held\n"
        slurm.said("scontrol", "release", str(job))
        ended = slurm.finished(job, 2 * LONG)
    assert ended.state == "COMPLETED" and ended.restarts == 0, said(run, slurm)
    for words in ("PP: 1 x 2 ranks", "2 nodes are well", "10.99.0.2", "10.99.0.3"):
        assert words in printed(run, job), printed(run, job)
    assert run.manifest("M2/evaluation") is not None and weights(run, "M2") != weights(run, "M1")
    candidates = run.manifest("round_1/candidates")
    assert candidates is not None and candidates.rows == 64
    logs = run.jobs / str(job) / "attempt_0"
    assert {path.name for path in logs.iterdir() if path.is_dir()} == {"preflight", "M1", "round_1-reference"}
    assert not (logs / "preflight/bad_nodes").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--partition=gpu"], "no partition gpu: give --partition, one of debug"),
        (["--nodes=4", "sft.global_batch_size=4"], "4 nodes are more than partition debug has, 3"),
        (["trainer.device=auto", "launch.processes_per_node=4"], "4 GPUs per node are more than a node of partition"),
        (["parallel.data_parallel_size=2"], "TP 1 * PP 2 * DP 2 = 4, but the world size is 2"),
        (["--time=2 days"], "sbatch --test-only"),
    ],
)
def test_refused_before_submission(slurm: Cluster, tmp_path: Path, arguments: list[str], message: str) -> None:
    command = [
        SRLM,
        "launch",
        "slurm",
        "--submit",
        ROOT / "launch/configs/toy_cpu.yaml",
        *TINY,
        f"run.dir={tmp_path}/r",
    ]
    done = slurm.run(*command, *arguments)
    assert done.returncode == 2 and message in done.stderr, done.stdout + done.stderr
    assert slurm.said("squeue", "--noheader") == ""
