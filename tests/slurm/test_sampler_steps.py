"""Replicas as steps of an allocation on a real Slurm: where they are, what they see, and how they end."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from cluster import Cluster, text
from places import ROOT

from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.config.runtime import BackendTraits
from srlm_mega.launch.ranks import gpu_request
from srlm_mega.launch.sampler_environment import node_of, sampler_process

pytestmark = [pytest.mark.extra, pytest.mark.timing]
TOY = ROOT / "launch/configs/toy_cpu.yaml"
STEP = ["sampler.slurm=true", "sampler.device=cuda", "sampler.devices_per_node=2", "launch.slurm.gpu_type=h100"]
# TensorRT-LLM 1.1's, with sleep for the MPI processes: a command that fails leaves the leader alive.
OLD_LAUNCHER = """#!/bin/bash
set -e
task_with_command="${@:1}"
if [ "$SLURM_PROCID" = 0 ]; then
  ( $task_with_command; touch "$FOLDER/stop" ) &
fi
touch "$FOLDER/begun.$SLURM_PROCID"
until [ -e "$FOLDER/stop" ]; do sleep 0.1; done
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Six replicas of one GPU on three nodes. Their `srlm` writes what it sees, and waits for the others."""
    srlm = tmp_path / "bin/srlm"
    srlm.parent.mkdir()
    srlm.write_text(
        f"""#!/bin/bash
echo "$(hostname) $CUDA_VISIBLE_DEVICES $SLURM_NTASKS $SLURM_CPUS_PER_TASK" >>{tmp_path}/$1
until [ "$(ls -d {tmp_path}/replica-* | wc -l)" = $2 ]; do sleep 0.1; done
"""
    )
    srlm.chmod(0o755)
    return load_config(TOY, [*STEP, "sampler.num_devices=6", f"sampler.python={srlm.parent}/python"])


def job(slurm: Cluster, config: Config, folder: Path, commands: Sequence[Sequence[str]]) -> str:
    """Run commands side by side in a job on all nodes with all their GPUs, of a type; its output, with `codes` of the
    commands in a last line."""
    lines = [f"{shlex.join(command)} & pids+=($!)" for command in commands]
    script, out = folder / "job.sh", folder / "job.out"
    ends = ["for pid in ${pids[@]}; do wait $pid; codes+=($?); done", 'echo "codes ${codes[*]}"']
    script.write_text("\n".join(["#!/bin/bash", *lines, *ends, ""]))
    options = ["--nodes=3", "--ntasks-per-node=1", "--exclusive", "--mem=0", gpu_request(config.launch.slurm, 2)]
    number = slurm.said("sbatch", "--parsable", *options, f"--output={out}", f"--chdir={folder}", script)
    slurm.finished(int(number))
    return text(out)


def test_a_replica_is_on_the_node_that_is_its_own(
    slurm: Cluster, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six at once, each with a GPU of its own; the last ones are started first."""
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")
    order = (5, 3, 1, 0, 2, 4)
    steps = [sampler_process(config, [f"replica-{number}", "6"], number) for number in order]
    assert job(slurm, config, tmp_path, steps).splitlines()[-1] == "codes 0 0 0 0 0 0"
    seen = {number: text(tmp_path / f"replica-{number}").split() for number in order}
    assert [seen[number][0] for number in range(6)] == [f"n{1 + node_of(number, config)}" for number in range(6)]
    assert {tuple(words[2:]) for words in seen.values()} == {("1", "1")}
    assert len({(words[0], words[1]) for words in seen.values()}) == 6, seen


def test_one_task_has_all_gpus_and_cores_of_its_replica(
    slurm: Cluster, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that splits a model over the GPUs of a node by itself."""
    traits = BackendTraits(
        needs_gpu=True, needs_mpi=False, splits_model=True, quantizes=True, loads_engine=False, continuous=True
    )
    monkeypatch.setattr("srlm_mega.config.runtime.traits_of", lambda backend: traits)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")
    split = config.model_copy(update={"sampler": config.sampler.model_copy(update={"tp_size": 2})})
    steps = [sampler_process(split, [f"replica-{number}", "3"], number) for number in range(3)]
    assert job(slurm, config, tmp_path, steps).splitlines()[-1] == "codes 0 0 0"
    assert [text(tmp_path / f"replica-{number}") for number in range(3)] == [f"n{n} 0,1 1 2\n" for n in (1, 2, 3)]


@pytest.mark.parametrize("code", [0, 3])
def test_a_step_ends_with_its_command(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Four tasks on two nodes and the old launcher, whose leader and workers outlive a command that fails. It does when
    all tasks have begun: srun ends one that has not with 143, which it then returns. There is no pmix here."""
    begun = 'until [ "$(ls "$FOLDER"/begun.* | wc -l)" = 4 ]; do sleep 0.1; done'
    srlm = f'#!/bin/bash\n{begun}\necho "$2"; exit $1\n'
    for name, content in (("trtllm-llmapi-launch", OLD_LAUNCHER), ("srlm", srlm)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")
    overrides = [*STEP, "sampler.backend=trtllm_torch", "sampler.tp_size=4", "sampler.num_devices=4",
                 "launch.slurm.gpu_option=gres"]  # fmt: skip
    config = load_config(TOY, [*overrides, f"sampler.python={tmp_path}/python"])
    argv = [word for word in sampler_process(config, [str(code), "a  b"], 0) if word != "--mpi=pmix"]
    settings = ["env", f"FOLDER={tmp_path}", f"PATH={tmp_path}:/usr/bin:/bin"]
    printed = job(slurm, config, tmp_path, [[*settings, *argv]])
    assert "a  b\n" in printed and printed.splitlines()[-1] == f"codes {code}", printed
    alive = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in alive if str(tmp_path) in line], "leader and workers"
