"""Further options of sbatch: what a job's script makes of them, and what is refused by name."""

import json
from pathlib import Path

import pytest
from places import ROOT

from srlm_mega.config.file import load_config
from srlm_mega.errors import UserError
from srlm_mega.launch.slurm import Partition, SlurmJob, check_fits, check_times, checked_script, parse_partition, render

TOY = ROOT / "launch/configs/toy_cpu.yaml"
GPUS = ("trainer.device=cuda", "launch.processes_per_node=8")


def job(*options: str, overrides: tuple[str, ...] = ()) -> SlurmJob:
    given = f"launch.slurm.sbatch_options={json.dumps(list(options))}"
    return SlurmJob("run", load_config(TOY, [given, *overrides]))


def lines(*options: str, overrides: tuple[str, ...] = ()) -> list[str]:
    """The script's #SBATCH lines."""
    text = render(job(*options, overrides=overrides))
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("-C h100", "--constraint=h100"),
        ("-Ch100", "--constraint=h100"),
        ("--constraint h100", "--constraint=h100"),
        ("--constraint=[rack1|rack2]", '"--constraint=[rack1|rack2]"'),
        ("-q high", "--qos=high"),
        ("-w node[1-3]", "--nodelist=node[1-3]"),
        ("-d afterok:12", "--dependency=afterok:12"),
        ("-H", "--hold"),
        ("--comment=two words", '"--comment=two words"'),
        ("--comment two words", '"--comment=two words"'),
        ("--gres=nvme:1", "--gres=nvme:1"),
        ("--mail-type=END,FAIL", "--mail-type=END,FAIL"),
        ("--exclude=n7", "--exclude=n7"),
        ("--time-min=1:00:00", "--time-min=1:00:00"),
        ("--mem-bind=local", "--mem-bind=local"),
    ],
)
def test_an_option_as_sbatch_reads_it(option: str, line: str) -> None:
    assert line in lines(option)


def test_variables_of_sbatch_count_where_nothing_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch itself would take them in place of what the script says, unseen by all checks."""
    for name, value in {
        "ACCOUNT": "mine",
        "QOS": "low",
        "TIMELIMIT": "2:00",
        "PARTITION": "a b",
        "EXPORT": "ALL",
    }.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    found = lines("-q high", overrides=('launch.slurm.time="1:00:00"',))
    assert {"--account=mine", "--qos=high", "--time=1:00:00", '"--partition=a b"', "--export=NONE"} <= set(found)
    with pytest.raises(UserError, match="2:00 is 120 s, and an attempt that comes further needs"):
        lines("-q high")
    monkeypatch.setenv("SBATCH_ACCOUNT", "a\nb")
    with pytest.raises(UserError, match="an option of sbatch has a line break"):
        lines("--time=1:00:00")


@pytest.mark.parametrize(
    ("option", "line", "gone"),
    [
        ("--mem=500G", "--mem=500G", "--mem=0"),
        ("--mem-per-gpu=60G", "--mem-per-gpu=60G", "--mem=0"),
        ("--exclusive=user", "--exclusive=user", "--exclusive"),
        ("-J mine", "--job-name=mine", "--job-name=srlm-toy"),
    ],
)
def test_what_takes_the_place_of_a_line_is_said(option: str, line: str, gone: str) -> None:
    assert gone in lines()
    assert line in lines(option) and gone not in lines(option)
    assert "# In place of what this script asks for by itself: " in render(job(option))


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("--no-requeue", "launch.slurm.max_restarts=0"),
        ("--no-req", "write its name in full"),
        ("--output=/tmp/x", "RUN/slurm/JOB.log"),
        ("-o /tmp/x", "--output=/tmp/x cannot be given"),
        ("-e/tmp/x", "--error=/tmp/x cannot be given"),
        ("--open-mode=truncate", "RUN/slurm/JOB.log"),
        ("-N 4", "--nodes=N"),
        ("-n 8", "one task per node"),
        ("--ntasks-per-node=8", "one task per node"),
        ("--gres=gpu:8", "launch.slurm.gpu_type"),
        ("--gres=nvme:1,gpu:h100:8", "launch.slurm.gpu_type"),
        ("-G 8", "launch.slurm.gpu_type"),
        ("--gpus-per-node=h100:8", "launch.slurm.gpu_type"),
        ("--signal=USR1@60", "launch.slurm.signal_seconds"),
        ("--export=ALL", "launch.slurm.environment"),
        ("-D /tmp", "in that folder"),
        ("--array=1-4", "a run is one job"),
        ("--test-only", "--dry-run"),
        ("--oversubscribe", "launch.slurm.exclusive=false"),
        ("--part=long", "write its name in full"),
        ("--tres-per-task=gres/gpu:1", "one task per node"),
        ("--requeue=x", "it has no value"),
        ("--time-mi=10", "write its name in full"),
        ("h100", "'h100' is no option of sbatch"),
        ("-Z 1", "'-Z 1' is no option of sbatch"),
        ("", "'' is no option of sbatch"),
    ],
)
def test_refused_by_name(option: str, remedy: str) -> None:
    with pytest.raises(UserError, match=r"launch\.slurm\.sbatch_options: ") as refused:
        lines(option)
    assert remedy in str(refused.value)


def test_other_resources_go_with_gpus_of_the_other_option_alone() -> None:
    overrides = (*GPUS, "launch.slurm.gpu_option=gres")
    assert {"--gres=nvme:1", "--gpus-per-node=8"} <= set(lines("--gres=nvme:1", overrides=GPUS))
    with pytest.raises(UserError, match="gpu_option=gpus-per-node"):
        lines("--gres=nvme:1", overrides=overrides)


@pytest.mark.parametrize("name", ["partition", "account", "time", "qos", "constraint", "reservation"])
def test_a_key_and_an_option_are_one(name: str) -> None:
    key = (f'launch.slurm.{name}="30"',)
    assert f"--{name}=30" in lines(overrides=key) and lines(f"--{name}=30") == lines(overrides=key)
    assert lines(f"--{name}=30", overrides=key) == lines(overrides=key), "twice the same"
    with pytest.raises(UserError, match=f"launch.slurm.{name}=30, and .*--{name}=40: remove one"):
        lines(f"--{name}=40", overrides=key)


def test_cores_of_an_option_take_the_place_of_ours() -> None:
    shared = ("launch.slurm.exclusive=false", "launch.cores_per_node=6")
    for option, line in (("-c 16", "--cpus-per-task=16"), ("--cpus-per-gpu=4", "--cpus-per-gpu=4")):
        found = [one for one in lines(option, overrides=shared) if one.startswith("--cpus-per")]
        assert found == [line]
        assert "by itself: cpus-per-task.\n" in render(job(option, overrides=shared))
    assert "In place of" not in render(job("-c 16", "--mem=1G", overrides=shared[:1])), "it asks for neither by itself"


def test_a_job_on_shared_nodes_says_how_many_cores_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srlm_mega.launch.slurm.shutil.which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    shared = ("launch.slurm.exclusive=false",)
    with pytest.raises(UserError, match=r"exclusive=false, and no number of cores: set launch\.cores_per_node"):
        checked_script(job(overrides=shared))
    for options, own in (((), ("launch.cores_per_node=2",)), (("-c 16",), ()), (("--exclusive",), ())):
        assert checked_script(job(*options, overrides=(*shared, *own)))


def test_a_shortest_time_is_checked_like_the_time() -> None:
    """Slurm may give no more."""
    with pytest.raises(UserError, match=r"--time-min=2:00 is 120 s"):
        lines("--time=10:00:00", "--time-min=2:00")


def test_a_time_in_the_options_is_checked_like_the_keys() -> None:
    with pytest.raises(UserError, match=r"launch\.slurm\.time=2:00 is 120 s"):
        lines("-t 2:00")


@pytest.mark.parametrize(
    ("written", "read"), [("24:00:00", "24:00:00"), ("1-12:00:00", "1-12:00:00"), ("90", "90"), ("'30:00'", "30:00")]
)
def test_time_in_yaml(written: str, read: str, tmp_path: Path) -> None:
    """Not a number of base 60; and a bare one is minutes, as on sbatch's command line."""
    file = tmp_path / "config.yaml"
    file.write_text(TOY.read_text().replace("launch: {", f"launch: {{slurm: {{time: {written}}}, "))
    assert load_config(file).launch.slurm.time == read
    assert load_config(TOY, [f"launch.slurm.time={written}"]).launch.slurm.time == read


def test_gpus_of_a_type() -> None:
    typed = (*GPUS, "launch.slurm.gpu_type=h100")
    assert "--gpus-per-node=h100:8" in lines(overrides=typed)
    assert "--gres=gpu:h100:8" in lines(overrides=(*typed, "launch.slurm.gpu_option=gres"))
    mixed = "gpu*|4|gpu:h100:4(S:0),gpu:a100:8(S:1)|infinite|n/a"
    counts = [parse_partition(mixed, kind).gpus_per_node for kind in (None, "h100", "a100", "v100")]
    assert counts == [12, 4, 8, 0]
    with pytest.raises(UserError, match=r"8 h100 GPUs per node are more than .* has, 4"):
        check_fits(None, 1, 8, [parse_partition(mixed, "h100")], "h100")


def test_shared_nodes() -> None:
    """Only what is asked for: without --exclusive, and memory by the cluster's default."""
    shared = ("launch.slurm.exclusive=false",)
    assert not {"--exclusive", "--mem=0"} & set(lines(overrides=shared))
    assert "--cpus-per-task=6" in lines(overrides=(*shared, "launch.cores_per_node=6"))
    assert "--mem=64G" in lines("--mem=64G", overrides=shared)
    assert not any(line.startswith("--cpus") for line in lines(overrides=("launch.cores_per_node=6",)))


@pytest.mark.parametrize("name", ["^docker0,lo", "=ib0", "ib0,ib1", "", "ib 0", "$(id)", "an_interface_of_17"])
def test_a_pattern_is_no_name_of_an_interface(name: str) -> None:
    """NCCL knows patterns, and gloo dies of them."""
    for given in (name, [name], ["ib0", name]):
        with pytest.raises(UserError, match=r"no full name of a network interface.*NCCL_SOCKET_IFNAME"):
            load_config(TOY, [f"launch.slurm.network_interface={json.dumps(given)}"])


SHORT = Partition("short", True, 4, 0, "1:00:00", "10:00")
LONG = Partition("long", False, 4, 0, "2-00:00:00", "n/a")
TINY = Partition("tiny", False, 4, 0, "5:00", "n/a")
HASTY = Partition("hasty", False, 4, 0, "infinite", "3:00")


@pytest.mark.parametrize(
    ("partition", "time", "message"),
    [
        ("short", "1:00:01", "1:00:01 is above the limit of partition short, 1:00:00"),
        ("short", "UNLIMITED", "above the limit of partition short"),
        ("short,long", "3-0", "above the limit of partition long, 2-00:00:00"),
        ("tiny", None, "partition tiny=5:00 is 300 s, and an attempt that comes further needs 478 s"),
        ("hasty", None, "partition hasty=3:00 is 180 s"),
    ],
)
def test_times_that_a_partition_does_not_have(partition: str, time: str | None, message: str) -> None:
    """Slurm would let the job wait for ever, or end it before it comes further."""
    given = [f"--partition={partition}", *([] if time is None else [f"--time={time}"])]
    with pytest.raises(UserError, match=message):
        check_times(job(*given), [SHORT, LONG, TINY, HASTY])


@pytest.mark.parametrize(
    "given",
    [
        ["--time=1:00:00"],
        [],
        ["--partition=long"],
        ["--partition=short,long", "--time=2-0"],
        ["--partition=hasty", "--time=90-0"],
        ["--partition=hasty", "--time=0"],
        ["--time=2:00:00", "--qos=long"],  # it may have a longer time than the partition
        ["--time=2 days"],  # Slurm's own message
    ],
)
def test_times_that_it_has(given: list[str]) -> None:
    check_times(job(*given), [SHORT, LONG, TINY, HASTY])
