"""Jobs as text, and what their script makes of how things end: Slurm and srlm are played by scripts.

`PYTHONPATH=tests/support python tests/launch/test_launch_slurm.py` writes the golden files anew; read the difference
before you commit it.
"""

import json
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from places import ROOT

from srlm_mega.config.file import load_config
from srlm_mega.errors import UserError
from srlm_mega.launch import slurm
from srlm_mega.launch.slurm import ENVIRONMENT, SlurmJob, Template, directive, render

GOLDEN = ROOT / "tests/golden"
LAUNCH = str(Path(slurm.__file__).parent)
TOY = Path(LAUNCH) / "configs/toy_cpu.yaml"
BIG = Path(LAUNCH) / "configs/llama2_70b_64gpu.yaml"
TWO_NODES = ("launch.nodes=2", "launch.processes_per_node=8", "trainer.device=cuda")
SAMPLED = ("sampler.device=cuda", "sampler.slurm=true")


def job(template: Template, *overrides: str, stages: tuple[str, ...] = (), workdir: Path = Path("/data")) -> SlurmJob:
    """A job of the toy's configuration, on two nodes of 8 GPUs unless told otherwise."""
    own = ("run.dir=runs/toy", "launch.slurm.python=/opt/srlm/bin/python")
    return SlurmJob(template, load_config(TOY, [*own, *TWO_NODES, *overrides]), stages, workdir)


@dataclass(frozen=True)
class AwkwardJob(SlurmJob):
    """A job whose name has a quote, and its run folder other things."""

    @property
    def name(self) -> str:
        return "srlm-it's"


def awkward(*overrides: str) -> SlurmJob:
    plain = job("run", "run.dir=" + json.dumps("100% $HOME `id`"), *overrides)
    return AwkwardJob("run", plain.config, workdir=Path('/data/Ann\'s "big" runs'))


def slurm_option(name: str, value: object) -> str:
    return f"launch.slurm.{name}={json.dumps(value)}"


JOBS = {
    "run": job("run"),
    "train": job(
        "train", "launch.slurm.gpu_option=gres", "launch.slurm.partition=long", stages=("round_1/reference", "M2")
    ),
    "sample": job(
        "sample", *SAMPLED, "sampler.num_devices=32", 'launch.slurm.time="24:00:00"',
        stages=("round_1/candidates",),
    ),
    "sample_few": job("sample", *SAMPLED, "sampler.num_devices=8", stages=("M1/evaluation",)),
    "bench": job("bench", "trainer.device=cpu", "launch.slurm.network_interface=ib0"),
    "run_awkward": awkward(
        slurm_option("python", "/opt/my srlm/bin/python"),
        slurm_option("partition", "debug,long"),
        slurm_option("account", 'physics "A"'),
        slurm_option("time", "2-00:00:00"),
        slurm_option("sbatch_options", ["--qos=high", "--comment=two words"]),
        slurm_option("modules", ["cuda/12.8", "gcc/13"]),
        slurm_option("environment", {"NCCL_IB_HCA": "mlx5_0,mlx5_1", "NOTE": "it's $5"}),
    ),
    "run_apptainer": job(
        "run",
        slurm_option("container", "/images/srlm training.sif"),
        slurm_option("container_runtime", "apptainer"),
        slurm_option("mounts", ["/models/Llama 2"]),
        slurm_option("secrets_file", "/home/ann/.srlm secrets"),
        slurm_option("network_interface", ["ib0", "ens5"]),
    ),
    "run_container": job(
        "run",
        slurm_option("container", "nvcr.io#nvidia/pytorch:25.09-py3"),
        slurm_option("mounts", ["/models/Llama 2"]),
        slurm_option("account", "physics"),
    ),
}  # fmt: skip
H100_STAGES: dict[Template, tuple[str, ...]] = {
    "run": (), "train": ("M1",), "sample": ("round_1/candidates", "round_1/judgements"), "bench": (),
}  # fmt: skip
for h100_template, h100_stages in H100_STAGES.items():  # the largest preset on 8 nodes of 8 H100, as an admin reads it
    h100_settings = {
        "python": "/opt/srlm/bin/python", "partition": "h100", "account": "llm", "qos": "long", "time": "2-00:00:00",
        "constraint": "ib", "gpu_type": "h100", "modules": ["slurm", "cuda/12.8"], "network_interface": "ib0",
        "secrets_file": "/home/ann/.srlm_secrets", "sbatch_options": ["--mail-type=END,FAIL"],
    }  # fmt: skip
    h100_config = load_config(BIG, [slurm_option(name, value) for name, value in h100_settings.items()])
    JOBS[f"h100_8x8_{h100_template}"] = SlurmJob(h100_template, h100_config, h100_stages, Path("/data"))


def rendered(job: SlurmJob) -> str:
    """The script as golden files have it: without the hash of its contents in the name of its folder."""
    return render(job).replace(job.folder.name, f"{job.template}-HASH")


@pytest.mark.parametrize("name", JOBS)
def test_golden(name: str) -> None:
    assert rendered(JOBS[name]) == (GOLDEN / f"{name}.sbatch").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", JOBS)
def test_shellcheck(name: str, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(render(JOBS[name]))
    argv = ["shellcheck", "--exclude=SC2016", str(script)]  # a $ in a path is meant as it is
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_of_the_scripts_themselves() -> None:
    scripts = sorted(map(str, Path(LAUNCH).resolve().glob("*.sh")))
    assert len(scripts) == 2
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False, cwd=Path(LAUNCH, ".."))
    assert done.returncode == 0, done.stdout


def test_no_variable_of_a_node_is_filled_in_elsewhere() -> None:
    """SLURM_NODEID and SLURM_PROCID in the script would be those of the batch host, for all tasks."""
    for job in JOBS.values():
        assert not re.search(r"SLURM_(NODEID|PROCID|LOCALID)", render(job))


def test_a_job_has_all_of_its_nodes_memory() -> None:
    for job in JOBS.values():
        assert "\n#SBATCH --exclusive\n" in render(job) and "\n#SBATCH --mem=0\n" in render(job)


def test_directives_are_read_back_by_slurms_rules() -> None:
    assert directive("/data/a-b_c.%j") == "/data/a-b_c.%j"
    assert directive('a "b" \\c') == '"a \\"b\\" \\\\c"'


def test_a_line_break_is_refused() -> None:
    with pytest.raises(UserError, match="account has a line break"):
        render(job("run", slurm_option("account", "a\n#SBATCH --nodes=99")))
    with pytest.raises(UserError, match="environment has a line break"):
        render(job("run", slurm_option("environment", {"A": "1\n2"})))
    for other in "\r\v\f\x1c\x85\u2028":
        with pytest.raises(UserError, match="account has a line break"):
            render(job("run", slurm_option("account", f"a{other}b")))
    with pytest.raises(UserError, match="'A B' is no name of a variable"):
        render(job("run", slurm_option("environment", {"A B": "1"})))
    script = render(job("run", slurm_option("environment", {"A": "1\\n2"})))
    assert "export A='1\\n2'" in script, "no line break, as it stands"


FAKES = {
    "srlm": """\
case "$1 $2" in
  "launch preflight")
    mkdir -p "${@: -1}"
    [[ ! -e $FAKES/slow ]] || { touch "$FAKES/begun"; while :; do sleep 0.05; done; }
    [[ ! -e $FAKES/bad ]] || cp "$FAKES/bad" "${@: -1}/bad_nodes"
    exit "$(cat "$FAKES/preflight")" ;;
  "launch progress") cat "$FAKES/progress" ;;
  run*)
    printf '%s\\n' "$@" >"$FAKES/arguments"
    env >"$FAKES/environment"
    further() { [[ ! -e $FAKES/further ]] || echo more >>"$FAKES/progress"; }
    trap 'further; exit 4' USR1
    if [[ -e $FAKES/saves ]]; then
      trap 'trap "" USR1; touch "$FAKES/saving"; sleep 1; echo saved >>"$FAKES/asked"; further; exit 4' USR1
      touch "$FAKES/begun"
      while :; do sleep 0.05; done
    fi
    if [[ -e $FAKES/long ]]; then
      touch "$FAKES/begun"
      until [[ -e $RUN/stop ]]; do sleep 0.05; done
      exit 4
    fi
    [[ ! -e $FAKES/by_hand ]] || touch "$RUN/stop"
    further
    exit "$(cat "$FAKES/run")" ;;
esac
""",
    "srun": 'printf \'%s\\n\' "$@" >"$FAKES/srun_arguments"\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": 'echo "$@" >>"$FAKES/asked"\n[[ $1 != show ]] || cat "$FAKES/shown"\n',
}


@dataclass(frozen=True)
class Stage:
    """A place where a job's script can run."""

    folder: Path
    job: SlurmJob
    shell: tuple[str, ...] = ("bash",)

    def start(self, attempt: int = 0, preflight: int = 0, code: int = 0, **flags: str) -> "subprocess.Popen[str]":
        """The script; `flags` are files that the players look for."""
        shown = "   ReqNodeList=(null) ExcNodeList=n7\n   PreemptEligibleTime=2026-11-30T12:00:00 PreemptTime=None\n"
        files = {"preflight": str(preflight), "run": str(code), "progress": "seed\n", "shown": shown} | flags
        for name, content in files.items():
            (self.folder / name).write_text(content)
        self.job.env_file.parent.mkdir(parents=True, exist_ok=True)
        self.job.env_file.write_bytes(ENVIRONMENT.read_bytes())
        script = self.folder / "job.sbatch"
        script.write_text(render(self.job))
        settings = {
            "PATH": f"{self.folder}:/usr/bin:/bin", "FAKES": str(self.folder), "RUN": str(self.job.run.root),
            "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2",
            "SLURM_RESTART_COUNT": str(attempt),
        }  # fmt: skip
        return subprocess.Popen(
            [*self.shell, str(script)], env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def ended(self, process: "subprocess.Popen[str]") -> tuple[int, str]:
        """Its exit code and what it printed."""
        printed, _ = process.communicate(timeout=240)
        return process.returncode, printed

    def asked_of_slurm(self) -> list[str]:
        """What it had scontrol do."""
        file = self.folder / "asked"
        return file.read_text().splitlines() if file.exists() else []

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"{name} did not come"
            time.sleep(0.02)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    folder = tmp_path / "it's a place"
    folder.mkdir()
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}")
        (folder / name).chmod(0o755)
    run = folder / 'run "1" $HOME'
    run.mkdir()
    settings = [f"run.dir={json.dumps(str(run))}", slurm_option("python", str(folder / "python"))]
    return Stage(folder, job("run", *settings, slurm_option("max_restarts", 3)))


@pytest.mark.timing
def test_done(stage: Stage) -> None:
    """And every argument arrives as it is, whatever is in the path."""
    own = stage.job.config.launch.slurm.model_copy(
        update={"environment": {"NOTE": "it's $5"}, "network_interface": "ib0"}
    )
    launch = stage.job.config.launch.model_copy(update={"slurm": own})
    job = replace(stage.job, config=stage.job.config.model_copy(update={"launch": launch}))
    code, printed = stage.ended(replace(stage, job=job).start())
    assert code == 0 and printed.endswith("done\n"), printed
    assert stage.asked_of_slurm() == []
    assert (stage.folder / "arguments").read_text().splitlines() == ["run", str(job.config_file)]
    options = (stage.folder / "srun_arguments").read_text().splitlines()
    assert options[-4:] == ["preflight", str(job.config_file), "--out", f"{job.run.jobs}/5/attempt_0/preflight"]
    assert "--export=ALL" in options and "--nodes=2" in options
    settings = (stage.folder / "environment").read_text().splitlines()
    assert {"NOTE=it's $5", "NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0", "PYTHONSAFEPATH=1"} <= set(settings)


@pytest.mark.timing
def test_secrets_come_from_a_file_as_they_are(stage: Stage) -> None:
    """Although the job's environment is clean; none of them is in what the job writes."""
    file = stage.folder / "my secrets"
    file.write_text(
        '# mine\nWANDB_API_KEY=ab$HOME`id`=\n\nWINDOWS=abc\r\nJUDGE_KEY=it\'s "it" =='
    )  # no last line break
    file.chmod(0o700)  # yours alone, as the submission takes it
    own = stage.job.config.launch.slurm.model_copy(update={"secrets_file": file})
    launch = stage.job.config.launch.model_copy(update={"slurm": own})
    job = replace(stage.job, config=stage.job.config.model_copy(update={"launch": launch}))
    code, printed = stage.ended(replace(stage, job=job).start())
    assert code == 0, printed
    settings = (stage.folder / "environment").read_text().splitlines()
    assert {"WANDB_API_KEY=ab$HOME`id`=", 'JUDGE_KEY=it\'s "it" ==', "WINDOWS=abc"} <= set(settings)
    written = [path for path in job.run.root.rglob("*") if path.is_file()]
    assert not any("ab$HOME" in path.read_text() for path in written) and "ab$HOME" not in printed + render(job)
    (stage.folder / "arguments").unlink()
    file.chmod(0o640)
    code, printed = stage.ended(replace(stage, job=job).start())
    assert code == 2 and "chmod 600" in printed and not (stage.folder / "arguments").exists()


MODULE = """\
module() {
  echo "$LD_PRELOAD" >/dev/null
  echo "module $*" >>"$FAKES/modules"
  [[ $1 != purge || ! -e $FAKES/takes_slurm ]] || PATH=$FAKES/few
  [[ $1 != load ]] || export MODULESHOME=/usr/share
  [[ $1 != load || $2 == nothing/* ]] || export LOADEDMODULES=$LOADEDMODULES:$2/1.0
  [[ $2 != absent* && ($1 != purge || ! -e $FAKES/sticky) ]]
}
export -f module
exec bash "$1"
"""


def with_modules(stage: Stage, *modules: str, before: str | None = MODULE, **flags: str) -> tuple[int, str]:
    """How a job of these modules ends. Their command reads, as Lmod's does, a variable that is not set."""
    own = stage.job.config.launch.slurm.model_copy(update={"modules": modules})
    launch = stage.job.config.launch.model_copy(update={"slurm": own})
    job = replace(stage.job, config=stage.job.config.model_copy(update={"launch": launch}))
    (stage.folder / "few").mkdir()
    for name in ("date", "hostname"):
        (stage.folder / "few" / name).symlink_to(f"/usr/bin/{name}")
    shell = ["bash"] if before is None else ["bash", "-c", before, "with_modules"]
    return stage.ended(replace(stage, job=job, shell=tuple(shell)).start(**flags))  # type: ignore[arg-type]


@pytest.mark.timing
def test_modules_are_loaded_before_anything_runs(stage: Stage) -> None:
    code, printed = with_modules(stage, "cuda/12.8", "it's", "it's", sticky="")
    assert code == 0 and printed.endswith("done\n") and "sticky modules stay" in printed, printed
    assert (stage.folder / "modules").read_text() == "module purge\nmodule load cuda/12.8\n" + 2 * "module load it's\n"


@pytest.mark.timing
@pytest.mark.parametrize(
    ("modules", "before", "flags", "message"),
    [
        (("gcc", "absent/1"), MODULE, {}, "ended: module load absent/1 ended with 1"),
        (("absent/1", "gcc"), MODULE, {}, "ended: module load absent/1 ended with 1"),
        (("gcc", "nothing/1"), MODULE, {}, "ended: module load nothing/1 loaded nothing"),
        (("gcc",), None, {}, "module is no command on .*bash_profile"),
        (("gcc",), MODULE, {"takes_slurm": ""}, "srun and scontrol are not on PATH after module purge"),
    ],
)
def test_a_module_that_fails_ends_the_job(
    stage: Stage, modules: tuple[str, ...], before: str | None, flags: dict[str, str], message: str
) -> None:
    """It would go on with another stack, and end well."""
    code, printed = with_modules(stage, *modules, before=before, **flags)
    assert code == 2 and re.search(message, printed), printed
    assert not (stage.folder / "arguments").exists() and stage.asked_of_slurm() == []


MODULE_FILES = {"cuda/12.8": "setenv CUDA_HOME /cuda", ".modulerc": "module-alias toolkit cuda/12.8", "ends": "break"}


@pytest.mark.timing
@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (("toolkit", "cuda"), None),
        (("cuda/12.8", "absent"), "load absent ended with 1: does module avail list it"),
        (("cuda", "ends"), "load ends (ended with 1|loaded nothing)"),
        (("cuda", "toolkit"), "load toolkit loaded nothing.* Another name"),
    ],
)
@pytest.mark.parametrize("init", ["/usr/share/modules/init/bash", "/usr/share/lmod/lmod/init/bash"])
def test_real_modules(stage: Stage, init: str, modules: tuple[str, ...], message: str | None) -> None:
    """Environment Modules and Lmod, of which a machine has one. Where Lmod's file breaks off, module ends with 0."""
    if not Path(init).exists():
        pytest.skip(f"no {init} here (apt-get install environment-modules, or lmod)")
    for name, content in MODULE_FILES.items():
        file = stage.folder.parent / "files" / name  # Lmod cannot read one with a quote in its path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#%Module1.0\n{content}\n")
    files = f"module use {stage.folder.parent}/files"
    code, printed = with_modules(stage, *modules, before=f'source {init}\n{files}\nexec bash "$1"')
    if message is None:
        assert code == 0, printed
        assert "CUDA_HOME=/cuda" in (stage.folder / "environment").read_text().splitlines()
    else:
        assert code == 2 and re.search(f"ended: module {message}", printed), printed


@pytest.mark.timing
@pytest.mark.parametrize("code", [2, 3])
def test_what_another_attempt_would_not_change(stage: Stage, code: int) -> None:
    assert stage.ended(stage.start(code=code, further=""))[0] == code
    assert stage.asked_of_slurm() == []


@pytest.mark.timing
def test_preempted(stage: Stage) -> None:
    code, printed = stage.ended(stage.start(code=4, further=""))
    assert code == 0 and "Queued again" in printed
    assert stage.asked_of_slurm() == ["requeue 5"]


@pytest.mark.timing
def test_asked_to_stop_before_it_came_further(stage: Stage) -> None:
    """The next attempt has the same time limit. A preempted one may have longer."""
    process = stage.start(long="")
    stage.wait_for("begun")
    process.send_signal(signal.SIGUSR1)
    ended, printed = stage.ended(process)
    assert ended == 4 and "before it came further: not queued again" in printed, printed
    assert stage.asked_of_slurm() == ["show job 5"]
    for flag in ("asked", "long"):
        (stage.folder / flag).unlink()
    assert stage.ended(stage.start(code=4))[0] == 4, "the steps alone were asked"
    assert stage.asked_of_slurm() == ["show job 5"]
    (stage.folder / "asked").unlink()
    code, printed = stage.ended(stage.start(code=4, shown=" PreemptTime=2026-11-30T12:00:00 LastSchedEval=None\n"))
    assert code == 0 and "Queued again" in printed
    assert stage.asked_of_slurm() == ["show job 5", "requeue 5"]


@pytest.mark.timing
def test_a_person_who_makes_the_stop_file_means_it(stage: Stage) -> None:
    code, printed = stage.ended(stage.start(code=4, by_hand=""))
    assert code == 4 and "stopped by the file" in printed
    assert stage.asked_of_slurm() == []


@pytest.mark.timing
def test_crashed_with_and_without_progress(stage: Stage) -> None:
    assert stage.ended(stage.start(code=1))[0] == 1
    assert stage.asked_of_slurm() == []
    assert stage.ended(stage.start(code=1, further=""))[0] == 0
    assert stage.asked_of_slurm() == ["requeue 5"]


@pytest.mark.timing
def test_restarts_are_bounded(stage: Stage) -> None:
    code, printed = stage.ended(stage.start(code=4, attempt=3, further=""))
    assert code == 4 and "3 restarts, launch.slurm.max_restarts=3" in printed
    (stage.folder / "arguments").unlink()
    assert stage.ended(stage.start(attempt=4))[0] == 1, "Slurm itself queued it once too often"
    assert not (stage.folder / "arguments").exists() and stage.asked_of_slurm() == []
    assert stage.ended(stage.start(code=4, attempt=2, further=""))[0] == 0
    assert stage.asked_of_slurm() == ["requeue 5"]


@pytest.mark.timing
def test_a_bad_node_is_left_out(stage: Stage) -> None:
    """Besides those that were left out before. A waiting job takes it, a running one does not: requeue first."""
    code, printed = stage.ended(stage.start(preflight=2, bad="n1\nn2\n"))
    assert code == 0 and "Queued again without n1,n2" in printed
    assert stage.asked_of_slurm() == ["requeue 5", "show job 5", "update jobid=5 excnodelist=n7,n1,n2"]
    assert not (stage.folder / "arguments").exists(), "nothing was run"


@pytest.mark.timing
def test_nobody_to_blame(stage: Stage) -> None:
    code, printed = stage.ended(stage.start(preflight=2))
    assert code == 2 and "no node is to blame" in printed
    assert stage.asked_of_slurm() == []


@pytest.mark.timing
def test_the_warning_reaches_the_run(stage: Stage) -> None:
    process = stage.start(long="", further="")
    stage.wait_for("begun")
    process.send_signal(signal.SIGUSR1)
    assert stage.ended(process)[0] == 0
    assert stage.asked_of_slurm() == ["requeue 5"]


@pytest.mark.timing
@pytest.mark.parametrize(("second", "code", "asked"), [("USR1", 0, ["saved", "requeue 5"]), ("TERM", 4, ["saved"])])
def test_a_second_signal_does_not_end_the_save(stage: Stage, second: str, code: int, asked: list[str]) -> None:
    process = stage.start(saves="", further="")
    stage.wait_for("begun")
    process.send_signal(signal.SIGUSR1)
    stage.wait_for("saving")
    process.send_signal(signal.Signals[f"SIG{second}"])
    assert stage.ended(process)[0] == code
    assert stage.asked_of_slurm() == asked


@pytest.mark.timing
def test_the_warning_in_the_preflight(stage: Stage) -> None:
    process = stage.start(slow="", shown="PreemptTime=2026-11-30T12:00:00\n")
    stage.wait_for("begun")
    process.send_signal(signal.SIGUSR1)
    assert stage.ended(process)[0] == 0
    asked = stage.asked_of_slurm()
    assert asked == ["show job 5", "requeue 5"] and not (stage.folder / "arguments").exists()
    (stage.folder / "begun").unlink()
    process = stage.start(slow="")
    stage.wait_for("begun")
    process.send_signal(signal.SIGUSR1)
    code, printed = stage.ended(process)
    assert code == 4 and "in the preflight, before it came further: not queued again" in printed, printed


@pytest.mark.timing
def test_what_slurm_ends_is_not_queued_again(stage: Stage) -> None:
    process = stage.start(long="")
    stage.wait_for("begun")
    process.send_signal(signal.SIGTERM)
    code, printed = stage.ended(process)
    assert code == 4 and "Queued again" not in printed
    assert stage.asked_of_slurm() == [] and stage.job.run.stop_file.exists()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for golden_name, golden_job in JOBS.items():
        (GOLDEN / f"{golden_name}.sbatch").write_text(rendered(golden_job), encoding="utf-8")
