"""Submission to a real Slurm cluster: what a job that waits will run, and what is refused at once."""

import sys
from pathlib import Path

import pytest
from cluster import Cluster, text
from places import ROOT

from srlm_mega.config.file import load_config

pytestmark = [pytest.mark.extra, pytest.mark.timing]
TOY = ROOT / "launch/configs/toy_cpu.yaml"


MODULE = """\
module() {  # as Lmod's, it reads a variable that is not set
  echo "$LD_PRELOAD" >/dev/null
  [[ $1 != load ]] || { [[ $2 == cuda/* ]] && export LOADEDMODULES=$2 MODULESHOME=/ CUDA_HOME=/cuda; }
}
"""
# In place of the run: it waits for the warning, and has made nothing by then.
SRLM = """\
#!/bin/bash
[[ $1 == run ]] || exit 0
trap 'exit 4' USR1
echo "begun with $CUDA_HOME"
while :; do sleep 0.1; done
"""


def launched(slurm: Cluster, run: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
    """`srlm launch slurm` on the head: its exit code, and what it printed."""
    srlm, exported = Path(sys.executable).parent / "srlm", [f"{name}={value}" for name, value in variables.items()]
    done = slurm.run("env", *exported, srlm, "launch", "slurm", TOY, f"run.dir='{run}'", *arguments)
    return done.returncode, done.stdout, done.stderr


def submitted(slurm: Cluster, run: Path, *arguments: str) -> tuple[int, Path]:
    """Number and log of a job."""
    code, printed, said = launched(slurm, run, "--submit", *arguments)
    assert code == 0, said
    number = int(printed.split()[1].rstrip(":"))
    return number, run / f"slurm/{number}.log"


def test_two_submissions_of_one_run(slurm: Cluster, tmp_path: Path) -> None:
    """Each will run its own configuration and env.sh; the second submission says that there is a first."""
    held = """launch.slurm.sbatch_options=["--hold"]"""
    scripts = []
    for seed in (1, 2):
        code, printed, said = launched(slurm, tmp_path / "a run", "--submit", held, f"run.seed={seed}")
        assert code == 0 and ("already in the queue" in said) == (seed == 2), printed + said
        shown = slurm.said("scontrol", "show", "job", printed.split()[1].rstrip(":"))
        scripts.append(Path(next(line for line in shown.splitlines() if "Command=" in line).partition("=")[2]))
    seeds = []
    for script in scripts:
        lines = script.read_text().splitlines()
        assert f"source '{script.with_name('env.sh')}'" in lines and script.with_name("env.sh").is_file()
        assert f"readonly config='{script.with_suffix('.yaml')}'" in lines
        seeds.append(load_config(script.with_suffix(".yaml")).run.seed)
    assert seeds == [1, 2]
    slurm.said("scancel", "--user=root")


def test_a_job_without_its_modules_ends(slurm: Cluster, tmp_path: Path) -> None:
    """On nodes without the command `module`, and with one that does not find the second module."""
    for profile, why in (("", "module is no command on "), (MODULE, "module load gcc ended with 1")):
        (slurm.root / "profile").write_text(profile)
        number, log = submitted(slurm, tmp_path / "run", 'launch.slurm.modules=["cuda/12.8", "gcc"]')
        job = slurm.finished(number)
        assert job.state == "FAILED" and job.restarts == 0 and why in text(log), text(log)
        assert "preflight" not in text(log), text(log)


def test_a_job_that_was_warned_before_it_came_further_ends(slurm: Cluster, tmp_path: Path) -> None:
    """It would come back with the same time limit. It begins with its module loaded."""
    (slurm.root / "profile").write_text(MODULE)
    srlm = tmp_path / "srlm"
    srlm.write_text(SRLM)
    srlm.chmod(0o755)
    options = ['launch.slurm.modules=["cuda/12.8"]', f"launch.slurm.python={tmp_path}/python"]
    number, log = submitted(slurm, tmp_path / "run", *options)
    slurm.wait("that the run begins", lambda: "begun with /cuda" in text(log))
    slurm.said("scancel", "--batch", "--signal=USR1", str(number))
    job = slurm.finished(number)
    assert job.state == "FAILED" and job.restarts == 0, text(log)
    assert "stopped on demand, before it came further: not queued again" in text(log), text(log)


def test_an_empty_file_does_not_wait_in_the_queue(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").touch()
    data = ["prompts.generator=file", f"prompts.path={tmp_path}/prompts.jsonl"]
    code, _, said = launched(slurm, tmp_path / "run", "--submit", *data)
    assert code == 2 and "prompts.jsonl is empty (0 bytes)" in said and not (tmp_path / "run").exists(), said


def test_a_limit_of_two_minutes(slurm: Cluster, tmp_path: Path) -> None:
    code, _, said = launched(slurm, tmp_path / "run", "--submit", "--time=2:00")
    assert code == 2 and "launch.slurm.time=2:00 is 120 s, and an attempt that comes further needs 478 s" in said, said
    assert slurm.said("squeue", "--noheader") == "" and not (tmp_path / "run").exists()


def test_a_time_that_the_partition_never_gives(slurm: Cluster, tmp_path: Path) -> None:
    code, _, said = launched(slurm, tmp_path / "run", "--submit", "--time=1:30:00")
    assert code == 2 and "above the limit of partition debug, 1:00:00" in said, said


def test_options_and_gpus_of_a_type(slurm: Cluster, tmp_path: Path) -> None:
    """Slurm takes them from the script, and not from variables that are another's; of a type that the nodes do not have
    nothing is submitted."""
    others = {"SBATCH_TIMELIMIT": "30", "SBATCH_NO_REQUEUE": "1", "SBATCH_CONSTRAINT": "ib"}
    gpus = ["trainer.device=cuda", "launch.slurm.gpu_type=h100", "--no-rehearsal"]
    options = 'launch.slurm.sbatch_options=["-H", "--mem=500", "-J mine", "--gres-flags=enforce-binding"]'
    for option, request in (("gpus-per-node", "gres:gpu:h100:2"), ("gres", "gres:gpu:h100:2")):
        chosen = f"launch.slurm.gpu_option={option}"
        arguments = ("--submit", *gpus, options, chosen, "--time=1:00:00")
        code, printed, said = launched(slurm, tmp_path / option, *arguments, **others)
        assert code == 0, said
        shown = slurm.said("scontrol", "show", "job", printed.split()[1].rstrip(":"))
        for words in (
            "JobName=mine", "TimeLimit=01:00:00", "MinMemoryNode=500M", f"TresPerNode={request}", "Requeue=1",
            "Features=ib",
        ):  # fmt: skip
            assert words in shown, shown
    slurm.said("scancel", "--user=root")
    other = [*gpus, "launch.slurm.gpu_type=a100"]
    code, _, said = launched(slurm, tmp_path / "run", "--submit", *other)
    assert code == 2 and "2 a100 GPUs per node are more than a node of partition debug has, 0" in said, said


def test_shared_nodes_have_room_for_others(slurm: Cluster, tmp_path: Path) -> None:
    """A job for one GPU leaves the node's other one to the next."""
    small = ["trainer.device=cuda", "launch.processes_per_node=1", "parallel.pipeline_model_parallel_size=1"]
    small += ["launch.slurm.exclusive=false", "launch.cores_per_node=1", "--no-rehearsal"]
    options = 'launch.slurm.sbatch_options=["--mem=100", "--nodelist=n1", "--begin=now+1hour"]'
    code, printed, said = launched(slurm, tmp_path / "run", "--submit", *small, options)
    assert code == 0, said
    shown = slurm.said("scontrol", "show", "job", printed.split()[1].rstrip(":"))
    for words in ("OverSubscribe=OK", "TresPerNode=gres:gpu:1", "CPUs/Task=1", "MinMemoryNode=100M"):
        assert words in shown, shown
    slurm.said("scancel", "--user=root")
