"""CPU threads of a run's processes: all cores of the machine where it begins, divided among what runs at once."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from places import TOY

from srlm_mega.config import Config
from srlm_mega.config.file import load_config, to_yaml
from srlm_mega.controller import loop
from srlm_mega.errors import UserError
from srlm_mega.launch import cores
from srlm_mega.launch.cores import usable_cores, with_cores
from srlm_mega.run.identity import check_all_unchanged, config_of, layout_of
from srlm_mega.run.manifest import Manifest
from srlm_mega.run.plan import find_stage
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.job_files import SampledModel
from srlm_mega.sampling.replicas import Replicas

THREADS = "launch.threads_per_process"


def configured(*overrides: str) -> Config:
    """The demo's configuration, which has a number of threads, with this left open."""
    return load_config(TOY, [f"{THREADS}=null", *overrides])


def machine(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: number)


def test_usable_cores_are_the_fewest_of_affinity_job_and_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    quota = tmp_path / "cpu.max"
    assert usable_cores(quota) == 16
    for text, wanted in (("max 100000\n", 16), ("350000 100000\n", 3), ("9900000 100000\n", 16), ("5000 100000\n", 1)):
        quota.write_text(text)
        assert usable_cores(quota) == wanted, text
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "12")
    quota.write_text("max 100000\n")
    assert usable_cores(quota) == 12
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "twelve")
    with pytest.raises(UserError, match="SLURM_CPUS_ON_NODE must be a number"):
        usable_cores(quota)


@pytest.mark.parametrize(
    ("options", "training", "replicas"),
    [
        (["launch.cores_per_node=8"], 4, 8),
        (["launch.cores_per_node=8", "sampler.num_devices=3"], 4, 2),
        (["launch.cores_per_node=1", "sampler.num_devices=4"], 1, 1),
        (["launch.cores_per_node=96", "sampler.slurm=true", "sampler.num_devices=16"], 48, 12),
        (["launch.cores_per_node=8", f"{THREADS}=3", "sampler.num_devices=4"], 3, 3),
        ([], 1, 1),
    ],
)
def test_cores_are_divided_among_the_processes_that_run_at_once(
    options: list[str], training: int, replicas: int
) -> None:
    config = configured(*options)
    assert config.training_threads == training
    assert config.sampling_threads == replicas
    assert layout_of(find_stage(config, "M2"), config)[THREADS] == training
    for name in ("M1/evaluation", "round_1/prompts", "round_1/candidates"):
        assert config_of(find_stage(config, name), config)[THREADS] == replicas, name


def test_on_gpus_the_number_of_threads_decides_nothing() -> None:
    """So the number of GPUs may change on the way, as ever."""
    for options in (["sampler.device=cuda"], ["sampler.backend=trtllm_torch"]):
        for number in (1, 4):
            config = configured("launch.cores_per_node=8", f"sampler.num_devices={number}", *options)
            assert config_of(find_stage(config, "round_1/candidates"), config)[THREADS] is None


def test_a_run_keeps_the_cores_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path)
    machine(monkeypatch, 6)
    begun = with_cores(configured(), run)
    assert begun.launch.cores_per_node == 6 and begun.launch.threads_per_process is None
    run.config_file.write_text(to_yaml(begun))
    assert with_cores(configured(), run) == begun and capsys.readouterr().err == ""

    machine(monkeypatch, 16)
    resumed = with_cores(configured(), run)
    assert resumed == begun
    line = capsys.readouterr().err
    assert "was begun with 6 cores per node" in line and " has 16." in line and "launch.cores_per_node=16" in line
    assert with_cores(configured("launch.cores_per_node=16"), run).launch.cores_per_node == 16
    assert with_cores(configured(f"{THREADS}=2"), run) == configured(f"{THREADS}=2")
    assert capsys.readouterr().err == ""


def test_a_run_of_an_older_version_keeps_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had 1 where nothing was said, and the samples that it finished say so."""
    run = RunDir(tmp_path)
    old = configured(f"{THREADS}=1")
    run.config_file.write_text(to_yaml(old).replace("  cores_per_node: null\n", ""))
    stage = find_stage(old, "round_1/candidates")
    finished = SimpleNamespace(config=config_of(stage, old), inputs=dict.fromkeys(stage.inputs, ""))
    monkeypatch.setattr(RunDir, "manifest", lambda self, name: finished if name == stage.name else None)
    machine(monkeypatch, 16)
    made = {stage.name: cast(Manifest, finished)}
    check_all_unchanged([stage], made, with_cores(configured(), run), run, {})
    with pytest.raises(UserError, match=r"launch\.threads_per_process: was 1, now 16\n.*--redo round_1/candidates"):
        check_all_unchanged([stage], made, with_cores(configured(), RunDir(tmp_path / "new")), run, {})


def test_processes_are_started_with_their_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = configured("launch.cores_per_node=8", "sampler.num_devices=4"), RunDir(tmp_path)

    class Started(Exception):
        """Nothing is run."""

    def start(*command: object, env: dict[str, str], **options: object) -> None:
        raise Started(env["OMP_NUM_THREADS"])

    with monkeypatch.context() as nothing_runs:
        nothing_runs.setattr(subprocess, "Popen", start)
        for name, threads in (("M1", 4), ("M1/evaluation", 2), ("round_1/candidates", 2)):
            with pytest.raises(Started, match=str(threads)):
                loop.execute([find_stage(config, name)], config, run, SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]

    replicas: list[str] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *_, env, **__: replicas.append(env["OMP_NUM_THREADS"]))
    started = Replicas(config, SampledModel(tmp_path, tmp_path), tmp_path / "replicas")
    started._started(0)
    started.close()
    assert replicas == ["2"], "8 cores, 4 replicas"
