"""From a configuration to a job: what it asks for, and what is refused before Slurm sees it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from srlm_mega.cli.launch import check_stages
from srlm_mega.cli.main import main
from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.errors import UserError
from srlm_mega.launch import slurm
from srlm_mega.launch.slurm import Partition, SlurmJob, Template, check_fits, load_for_job, parse_partition, render
from srlm_mega.launch.time_limit import seconds_of
from srlm_mega.report.status import progress_line
from srlm_mega.run.run_dir import RunDir

TOY = ROOT / "launch/configs/toy_cpu.yaml"
BIG = ROOT / "launch/configs/llama2_70b_64gpu.yaml"
CLUSTER = [Partition("debug", True, 4, 2), Partition("gpu", False, 10, 8), Partition("gpu", False, 100, 0)]


@pytest.mark.parametrize(
    ("template", "nodes", "gpus"), [("run", 8, 8), ("train", 8, 8), ("sample", 8, 8), ("bench", 8, 8)]
)
def test_what_the_largest_preset_asks_for(template: Template, nodes: int, gpus: int) -> None:
    job = SlurmJob(template, load_config(BIG))
    assert (job.nodes, job.gpus_per_node) == (nodes, gpus)


def test_nodes_are_what_training_and_sampling_need() -> None:
    """20 sampling GPUs on nodes of 8 are 3 nodes; training takes 2 of 4."""
    sampler = ["sampler.num_devices=20", "sampler.slurm=true", "sampler.device=cuda"]
    config = load_config(TOY, ["launch.nodes=2", "launch.processes_per_node=4", "trainer.device=cuda", *sampler])
    jobs = [SlurmJob("run", config), SlurmJob("train", config), SlurmJob("sample", config)]
    asked = {job.template: (job.nodes, job.gpus_per_node) for job in jobs}
    assert asked == {"run": (3, 8), "train": (2, 4), "sample": (3, 8)}
    assert SlurmJob("run", load_config(TOY)).gpus_per_node == 0, "the toy runs on CPUs"


def test_options_change_the_configuration() -> None:
    given = {"partition": "long", "account": 'the "A" team', "time": "1:00:00"}
    config = load_for_job(TOY, ["launch.processes_per_node=1"], "run", 2, given)
    options = config.launch.slurm
    assert (config.launch.launcher, config.launch.nodes) == ("slurm", 2)
    assert (options.partition, options.account, options.time) == ("long", 'the "A" team', "1:00:00")
    sampling = load_for_job(TOY, [], "sample", 2, {"time": None})
    assert sampling.sampler.num_devices == 16 and sampling.sampler.slurm
    assert sampling.launch.nodes == 1


def test_a_layout_that_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"world size .* 3 is not divisible by TP \* PP 2"):
        load_for_job(TOY, ["launch.processes_per_node=1"], "run", 3, {})


@pytest.mark.parametrize(
    ("line", "partition"),
    [
        ("debug*|4|(null)", Partition("debug", True, 4, 0)),
        ("gpu|16|gpu:h100:8(S:0-1)", Partition("gpu", False, 16, 8)),
        ("mixed|2|gpu:2,shard:16", Partition("mixed", False, 2, 2)),
        ("two|1|gpu:a100:4(S:0),gpu:v100:2(S:1)", Partition("two", False, 1, 6)),
    ],
)
def test_what_sinfo_says(line: str, partition: Partition) -> None:
    assert parse_partition(line) == partition


def play(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    """A command of Slurm's, played by a script."""
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_lines_of_sinfo_that_are_none_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(tmp_path, monkeypatch, "sinfo", "printf 'Welcome\\na|b|c|d\\nd|many|(null)\\ndebug*|4|(null)\\n'")
    assert slurm.partitions() == [Partition("debug", True, 4, 0)]
    play(tmp_path, monkeypatch, "sinfo", "echo Welcome")
    with pytest.raises(UserError, match=r"sinfo lists no partition.*Welcome"):
        slurm.partitions()


def test_slurm_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "PATIENCE_SECONDS", 0.2)
    for name in ("sinfo", "sbatch"):
        play(tmp_path, monkeypatch, name, "exec sleep 60")
    for call in (
        slurm.partitions,
        lambda: slurm.submit(Path("s")),
        lambda: slurm.check_by(["sbatch", "s"]),
    ):
        with pytest.raises(UserError, match=r"no answer in 0\.2 s"):
            call()


@pytest.mark.parametrize("printed", ["12", "12;cluster", "sbatch: a word of the site\\n\\n12;cluster\\n\\n"])
def test_the_number_of_a_submitted_job(printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(tmp_path, monkeypatch, "sbatch", f"printf '{printed}'")
    assert slurm.submit(Path("s")) == 12


def test_variables_of_slurms_commands_do_not_reach_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count more than the script's lines, or hide jobs of the queue."""
    play(tmp_path, monkeypatch, "sbatch", f"env >{tmp_path}/seen; echo 12")
    for name in ("SBATCH_NO_REQUEUE", "SBATCH_EXPORT", "SQUEUE_STATES", "SLURM_CONF"):
        monkeypatch.setenv(name, "1")
    slurm.submit(Path("s"))
    seen = {line.partition("=")[0] for line in (tmp_path / "seen").read_text().splitlines()}
    assert [name for name in sorted(seen) if name.startswith(("SBATCH", "SQUEUE", "SLURM"))] == ["SLURM_CONF"]


@pytest.mark.parametrize("printed", ["", "12 jobs", "submitted\\n"])
def test_no_number_of_a_job(printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(tmp_path, monkeypatch, "sbatch", f"printf '{printed}'")
    with pytest.raises(UserError, match="sbatch s: its answer has no job number"):
        slurm.submit(Path("s"))


@pytest.mark.parametrize(
    ("partition", "nodes", "gpus_per_node", "message"),
    [
        ("gpus", 1, 0, "no partition gpus: give --partition, one of debug, gpu"),
        (None, 1, 4, "4 GPUs per node are more than a node of partition debug has, 2"),
        ("gpu", 11, 8, "11 nodes with 8 GPUs are more than .* gpu has, 10"),
    ],
)
def test_refused_before_submission(partition: str | None, nodes: int, gpus_per_node: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_fits(partition, nodes, gpus_per_node, CLUSTER)


def test_what_fits() -> None:
    check_fits(None, 4, 2, CLUSTER)
    check_fits("gpu", 110, 0, CLUSTER)
    check_fits("debug,gpu", 10, 8, CLUSTER)
    with pytest.raises(UserError, match="no default partition: give --partition, one of gpu"):
        check_fits(None, 1, 0, CLUSTER[1:])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800), ("2:30", 180), ("24:00:00", 86_400), ("1-0", 86_400), ("1-12:30", 131_400),
        ("2-00:00:30", 172_860), ("UNLIMITED", None), ("infinite", None), ("-1", None), ("2 days", None), ("", None),
        ("0", None),
    ],
)  # fmt: skip
def test_time_limits_as_slurm_reads_them(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("time", "more", "message"),
    [
        ("2:00", [], "2:00 is 120 s.* needs 478 s: 58 s.*60 s.*300 s.*signal_seconds.*60 s"),
        ("5", [], "5 is 300 s"),
        ("7:00", [], "7:00 is 420 s"),
        ("0-1", ["launch.slurm.signal_seconds=3600"], "0-1 is 3600 s"),
        ("2:30", ["launch.slurm.signal_seconds=30"], "2:30 is 180 s.* needs 208 s"),
        ("10:00", ["model.path=null", "model.hidden_size=8192", "model.ffn_hidden_size=28672", "model.num_layers=80",
                   "model.num_attention_heads=64", "model.num_query_groups=8"], "10:00 is 600 s.* needs 7.. s"),
    ],
)  # fmt: skip
def test_a_time_limit_in_which_no_attempt_comes_further(time: str, more: list[str], message: str) -> None:
    """The warning comes at once, and the job would queue itself again until max_restarts."""
    for template in ("run", "bench"):
        with pytest.raises(UserError, match=message):
            render(SlurmJob(template, load_config(TOY, [*more, f'launch.slurm.time="{time}"'])))


def test_a_time_limit_with_room_for_progress() -> None:
    for time in ("8", "7:01", "24:00:00", "UNLIMITED", "2 days"):  # Slurm itself judges the last
        render(SlurmJob("run", load_config(TOY, [f'launch.slurm.time="{time}"'])))
    sampling = load_config(TOY, ["launch.nodes=2", 'launch.slurm.time="7:00"'])
    render(SlurmJob("sample", sampling, ("round_1/candidates",)))  # it has no preflight


@pytest.mark.parametrize(
    ("template", "stages", "message"),
    [
        ("train", (), "takes --stage.*M1, round_1/reference, M2.*got none"),
        ("train", ("round_1/candidates",), "takes --stage"),
        ("sample", ("M1",), "takes --stage.*round_1/candidates.*got M1"),
        ("run", ("M1",), "--stage is for --template train or sample"),
        ("train", ("M9",), "no stage M9"),
    ],
)
def test_stages_of_a_template(template: Template, stages: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_stages(load_config(TOY), template, stages)


def written(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[Config, Path]:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # without a cluster: `which` finds no Slurm
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    config = load_config(TOY, [f'run.dir="{folder}"', "launch.launcher=slurm", *overrides])
    job = SlurmJob("run", config)
    return config, slurm.write_job(job, slurm.checked_script(job))


def test_the_files_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Script and configuration, which is the resolved one; and the run folder may still be begun."""
    config, script = written(tmp_path / "it's a run", monkeypatch)
    assert (script.parent.parent, script.name) == (tmp_path / "it's a run/slurm", "run.sbatch")
    assert load_config(script.with_suffix(".yaml")) == config
    assert str(script.with_suffix(".yaml")).replace("'", "'\"'\"'") in script.read_text()
    with RunDir(config.run.dir).lock():
        pass
    with pytest.raises(UserError, match="no sbatch here"):
        slurm.submit(script)


def test_a_job_that_waits_keeps_what_was_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every submission has a folder of its own, with all that the job reads when it starts: also env.sh, which an
    update of the code may change meanwhile."""
    config, first = written(tmp_path / "run", monkeypatch)
    before = {file.name: file.read_bytes() for file in first.parent.iterdir()}
    assert sorted(before) == ["env.sh", "run.sbatch", "run.yaml"]
    assert before["env.sh"] == slurm.ENVIRONMENT.read_bytes()
    assert str(slurm.ENVIRONMENT.parent) not in first.read_text(), "it reads nothing of the code's folder"
    _, other = written(tmp_path / "run", monkeypatch, "run.seed=7")
    assert other.parent != first.parent and load_config(other.with_suffix(".yaml")).run.seed == 7
    changed = tmp_path / "env.sh"
    changed.write_text("export OMP_NUM_THREADS=2\n")
    monkeypatch.setattr(slurm, "ENVIRONMENT", changed)
    _, updated = written(tmp_path / "run", monkeypatch)
    assert len({first.parent, other.parent, updated.parent}) == 3
    assert {file.name: file.read_bytes() for file in first.parent.iterdir()} == before
    assert load_config(first.with_suffix(".yaml")) == config


def test_jobs_of_this_run_that_wait_or_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the script that they run, so that another run of the same name is none."""
    run = RunDir(tmp_path / "a run")
    rows = [f"12|PENDING|{run.jobs}/run-1/run.sbatch", f"13|RUNNING|{run.jobs}/x|y/t.sbatch", "14|RUNNING|(null)",
            f"15|PENDING|{tmp_path}/a run 2/slurm/run-1/run.sbatch", "Welcome"]  # fmt: skip
    (tmp_path / "rows").write_text("\n".join(rows) + "\n")
    play(tmp_path, monkeypatch, "squeue", f"echo \"$*\" >'{tmp_path}/asked'; cat '{tmp_path}/rows'")
    assert slurm.jobs_in_queue(run) == ["12 (PENDING)", "13 (RUNNING)"]
    assert f"--user={os.getuid()} " in (tmp_path / "asked").read_text(), "a cluster's whole queue is long"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert slurm.jobs_in_queue(run) == []


def test_a_missing_file_is_said_before_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"model\.path: there is no /nowhere"):
        written(tmp_path / "run", monkeypatch, "model.path=/nowhere", "pretrain=null")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        ("KEY=hidden\n", 0o644, "can be read by others than you: chmod 600"),
        ("KEY=hidden\n", 0o620, "can be read by others than you"),
        ("A=1\nexport KEY=hidden\n", 0o600, "line 2 is not of the form NAME=value"),
        ("KEY='hidden'\n", 0o600, "line 1 is not of the form NAME=value, without export and quotes"),
        ("KEY\n", 0o600, "line 1 is not"),
        ("KEY=hidden\n", 0o200, "cannot be read by you, or"),
        ("CLÉ=hidden\n", 0o600, "line 1 is not"),
        ("A=1\r\nKEY='hidden'\r\n", 0o600, "line 2 is not"),
    ],
)
def test_a_file_of_secrets_that_is_none(
    content: str, mode: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "secrets"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(UserError, match=message) as refused:
        written(tmp_path / "run", monkeypatch, f"launch.slurm.secrets_file={file}")
    assert "hidden" not in str(refused.value) and not (tmp_path / "run").exists()


def test_a_file_of_secrets_is_elsewhere_and_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secrets"
    with pytest.raises(UserError, match="secrets: there is no such file"):
        written(tmp_path / "run", monkeypatch, f"launch.slurm.secrets_file={file}")
    file.write_text("# for tracking\nWANDB_API_KEY=hidden==\n")
    file.chmod(0o600)
    _, script = written(tmp_path / "run", monkeypatch, f"launch.slurm.secrets_file={file}")
    assert not any("hidden==" in path.read_text() for path in script.parent.iterdir())
    inside = tmp_path / "run/secrets"
    inside.write_text("A=1\n")
    inside.chmod(0o600)
    with pytest.raises(UserError, match="is in the run"):
        written(tmp_path / "run", monkeypatch, f"launch.slurm.secrets_file={inside}")


def test_progress_in_one_line(tmp_path: Path) -> None:
    """Finished stages, checkpoints and shards: what an attempt may have added."""
    run = RunDir(tmp_path / "run")
    assert progress_line(run.root) == "nothing"
    run.root.mkdir()
    run.config_file.write_text(TOY.read_text())
    assert progress_line(run.root) == "nothing"
    for number in (9, 100):
        folder = run.partial("M1") / f"megatron/iter_{number:07d}"
        folder.mkdir(parents=True)
        (folder / "files.json").write_text("{}")
    (run.partial("M1") / "megatron/iter_0000200").mkdir()  # not whole
    shards = run.partial("round_1/candidates") / "candidates.jsonl.shards"
    shards.mkdir(parents=True)
    for name in ("shard_00000.jsonl", "shard_00003.jsonl", "shard_00003.failed.jsonl", "shard_00004.lease"):
        (shards / name).write_text("")
    assert progress_line(run.root) == "M1 step 100, round_1/candidates 2 shards"


def test_the_preflight_looks_at_the_nodes_that_train() -> None:
    sampler = ["sampler.num_devices=16", "sampler.slurm=true", "launch.launcher=slurm"]
    config = load_config(TOY, [*sampler, "launch.nodes=1"])
    whole = SlurmJob("run", config)
    assert (whole.nodes, whole.preflight_nodes) == (2, 1)
    wide = load_config(TOY, [*sampler, "launch.nodes=4"])
    assert SlurmJob("run", wide).preflight_nodes == 4
    sampling = SlurmJob("sample", wide, ("round_1/candidates",))
    assert (sampling.nodes, sampling.preflight_nodes) == (2, 0), "it would wait for nodes that are not there"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launch", "slurm", str(TOY), "--dry-run", "--submit"], "--dry-run or --submit, not both"),
        (["launch", "slurm", str(TOY), "--dry-run", "launch.slurm.signal_seconds=65536"], "65535"),
        (["doctor", "--timeout=0"], "--timeout"),
        (["launch", "preflight", str(TOY), "--nnodes=0"], "--nnodes"),
        (["launch", "preflight", str(TOY), "--node-rank=-1"], "--node-rank"),
        (["launch", "preflight", str(TOY), "--master-port=0"], "--master-port"),
        (["launch", "preflight", str(TOY), "--master-port=65535"], "--master-port"),
        (
            ["launch", "preflight", str(TOY), "--nnodes=2", "--node-rank=1", "--master-addr=no.such.invalid"],
            "no.such.invalid does not resolve",
        ),
    ],
)
def test_options_that_cannot_be_meant(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["srlm", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_dry_run_prints_and_writes_nothing(srlm: Path, tmp_path: Path) -> None:
    argv = [srlm, "launch", "slurm", TOY, f"run.dir={tmp_path / 'run'}", "--nodes=2", "--account=physics", "--dry-run"]
    printed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert "#SBATCH --nodes=2\n" in printed and "#SBATCH --account=physics\n" in printed
    assert not (tmp_path / "run").exists()
