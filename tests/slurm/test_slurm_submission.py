"""Submission to a real Slurm cluster: what a job that waits will run, and what is refused at once."""

import sys
from pathlib import Path

import pytest
from cluster import Cluster
from places import ROOT

from srlm_mega.config.file import load_config

pytestmark = [pytest.mark.extra, pytest.mark.timing]
TOY = ROOT / "launch/configs/toy_cpu.yaml"


def launched(slurm: Cluster, run: Path, *arguments: str) -> tuple[int, str, str]:
    """`srlm launch slurm` on the head: its exit code, and what it printed."""
    srlm = Path(sys.executable).parent / "srlm"
    done = slurm.run(srlm, "launch", "slurm", TOY, f"run.dir='{run}'", *arguments)
    return done.returncode, done.stdout, done.stderr


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
    """Here no node has the command `module`."""
    code, printed, said = launched(slurm, tmp_path / "run", "--submit", 'launch.slurm.modules=["cuda/12.8"]')
    assert code == 0, said
    job = slurm.finished(int(printed.split()[1].rstrip(":")))
    log = (tmp_path / f"run/slurm/{job.id}.log").read_text()
    assert job.state == "FAILED" and job.restarts == 0 and "module is no command on " in log, log
    assert "preflight" not in log, log


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
    """Slurm takes them from the script; of a type that the nodes do not have nothing is submitted."""
    gpus = ["trainer.device=cuda", "launch.slurm.gpu_type=h100", "--no-rehearsal"]
    options = 'launch.slurm.sbatch_options=["-H", "--mem=500", "-J mine", "--gres-flags=enforce-binding"]'
    for option, request in (("gpus-per-node", "gres:gpu:h100:2"), ("gres", "gres:gpu:h100:2")):
        chosen = f"launch.slurm.gpu_option={option}"
        code, printed, said = launched(slurm, tmp_path / option, "--submit", *gpus, options, chosen, "--time=1:00:00")
        assert code == 0, said
        shown = slurm.said("scontrol", "show", "job", printed.split()[1].rstrip(":"))
        for words in ("JobName=mine", "TimeLimit=01:00:00", "MinMemoryNode=500M", f"TresPerNode={request}"):
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
