"""From a configuration to a Slurm job: its resources, its script, and what is refused before it is submitted."""

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, assert_never

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from srlm_mega.config import Config
from srlm_mega.config.file import load_config, to_yaml
from srlm_mega.config.outside_files import check_outside_files
from srlm_mega.errors import UserError
from srlm_mega.launch.outside_inputs import check_inputs
from srlm_mega.launch.ranks import gpu_request, in_container, literal
from srlm_mega.launch.sbatch_options import SbatchOption, read_options, replaced
from srlm_mega.launch.time_limit import UNLIMITED, check_time_limit, seconds_of
from srlm_mega.run.files import write_atomic
from srlm_mega.run.identity import check_all_unchanged, config_of, contents_of
from srlm_mega.run.manifest import Manifest
from srlm_mega.run.outside_keys import keys_read_by
from srlm_mega.run.plan import plan
from srlm_mega.run.run_dir import RunDir

Template = Literal["run", "train", "sample", "bench"]
PARTITION = re.compile(r"[^|]+\|\d+\|[^|]*(\|[^|]*){0,2}")  # sites have sinfo and sbatch say other things as well
JOB_NUMBER = re.compile(r"^(\d+)(?:;\S*)?\Z", re.MULTILINE)  # in the last line; its cluster's name may follow
PATIENCE_SECONDS = 60.0
VARIABLES = ("SBATCH_", "SINFO_", "SQUEUE_")  # options of Slurm's commands
SCRIPT = Path(__file__).with_name("job.sbatch.j2")
ENVIRONMENT = Path(__file__).with_name("env.sh")
SECRET = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^'\"].*", re.DOTALL)
GPUS = re.compile(r"gpu:(?:([^:,(]+):)?(\d+)")


@dataclass(frozen=True)
class SlurmJob:
    """A job that does a configuration's whole run or one kind of work. `stages` are those of train and sample; the job
    runs in `workdir`, an absolute path."""

    template: Template
    config: Config
    stages: tuple[str, ...] = ()
    workdir: Path = field(default_factory=Path.cwd)

    @property
    def run(self) -> RunDir:
        """Run folder, absolute."""
        return RunDir(self.workdir / self.config.run.dir)

    @property
    def name(self) -> str:
        """Name in squeue."""
        return f"srlm-{self.run.root.name}"

    @cached_property
    def folder(self) -> Path:
        """Folder of the script and of what it reads when it starts. Its name has the hash of all that, so a job that
        waits runs what was submitted, whatever is launched or updated meanwhile."""
        parts = [str(self.workdir), str(self.bin_dir), *self.stages, to_yaml(self.config)]
        content = b"\0".join([*map(str.encode, parts), SCRIPT.read_bytes(), ENVIRONMENT.read_bytes()])
        return self.run.jobs / f"{self.template}-{hashlib.sha256(content).hexdigest()[:12]}"

    @property
    def config_file(self) -> Path:
        """File of the resolved configuration, which the job runs."""
        return self.folder / f"{self.template}.yaml"

    @property
    def env_file(self) -> Path:
        """File of variables, a copy of env.sh."""
        return self.folder / ENVIRONMENT.name

    @property
    def bin_dir(self) -> Path:
        """Folder of `srlm` on the nodes."""
        return Path(self.config.launch.slurm.python or sys.executable).absolute().parent

    @cached_property
    def options(self) -> tuple[SbatchOption, ...]:
        """Options of sbatch that are the user's. UserError for one that a job cannot have."""
        return read_options(self.config.launch.slurm, os.environ)

    def option(self, name: str) -> str | None:
        """Return the value of a user's option, None without it."""
        return next((option.value for option in self.options if option.name == name), None)

    @property
    def nodes(self) -> int:
        """Number of nodes that training and sampling need, whichever the job does."""
        sampler = self.config.sampler
        return self._needed(self.config.launch.nodes, -(-sampler.num_devices // sampler.devices_per_node))

    @property
    def gpus_per_node(self) -> int:
        """GPUs that each node needs; 0 where everything runs on CPUs."""
        config, sampler = self.config, self.config.sampler
        training = 0 if config.trainer.device == "cpu" else config.launch.processes_per_node
        sampling = 0 if sampler.device == "cpu" else min(sampler.num_devices, sampler.devices_per_node)
        return self._needed(training, sampling)

    def _needed(self, training: int, sampling: int) -> int:
        """Choose by the template between the figures of training and sampling."""
        match self.template:
            case "run":
                return max(training, sampling)
            case "sample":
                return sampling
            case "train" | "bench":
                return training
            case other:
                assert_never(other)

    @property
    def preflight_nodes(self) -> int:
        """Number of nodes that the preflight checks, the first ones, which train; 0 where the job has fewer."""
        return self.config.launch.nodes if self.config.launch.nodes <= self.nodes else 0


def load_for_job(
    path: Path, overrides: Sequence[str], template: Template, nodes: int | None, slurm: Mapping[str, str | None]
) -> Config:
    """Load the configuration with the command line's options. UserError when the layout does not divide over nodes."""
    options = [f"launch.slurm.{name}={json.dumps(value)}" for name, value in slurm.items() if value is not None]
    changed = [*overrides, "launch.launcher=slurm", *options]
    if nodes is None:
        return load_config(path, changed)
    if template == "sample":
        devices = nodes * load_config(path, changed).sampler.devices_per_node
        return load_config(path, [*changed, f"sampler.num_devices={devices}", "sampler.slurm=true"])
    return load_config(path, [*changed, f"launch.nodes={nodes}"])


def render(job: SlurmJob) -> str:
    """Return the script. UserError for a value with a line break, a wrong name of a variable, or too short a time."""
    slurm = job.config.launch.slurm
    values = {f"launch.slurm.{name}": value for name, value in slurm}
    values |= {"run.dir": job.run.root, "the working directory": job.workdir, "--stage": job.stages}
    values["an option of sbatch"] = tuple(map(str, job.options))
    for name, value in values.items():
        if has_line_break(value):
            raise UserError(f"{name} has a line break, which no line of a job can hold: {value!r}")
    for name in slurm.environment:
        if not name.isidentifier():
            raise UserError(f"launch.slurm.environment: {name!r} is no name of a variable: use letters, digits and _")
    for name in ("time", "time-min"):  # Slurm may give no more than the second
        if (time := job.option(name)) is not None:
            key = "launch.slurm.time" if name == "time" else "launch.slurm.sbatch_options: --time-min"
            check_time_limit(time, key, job.config, bool(job.preflight_nodes))
    templates = Environment(
        loader=FileSystemLoader(SCRIPT.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"quoted": lambda value: shlex.quote(str(value)), "directive": directive}
    mounts, gpus = (job.run.root, *slurm.mounts), job.config.trainer.device != "cpu"
    container = in_container(slurm.container_runtime, slurm.container, mounts, job.workdir, gpus)
    return templates.get_template(SCRIPT.name).render(
        job=job,
        slurm=slurm,
        secrets_file=None if slurm.secrets_file is None else job.workdir / slurm.secrets_file,
        replaced=replaced(job.options, job.config.launch),
        gpus=gpu_request(slurm, job.gpus_per_node) if job.gpus_per_node else None,
        log=f"{literal(job.run.jobs)}/%j.log",
        container_options=[shlex.quote(option) for option in container],
        srlm="srlm" if slurm.container else shlex.quote(str(job.bin_dir / "srlm")),
    )


def has_line_break(value: object) -> bool:
    """Tell whether a text, or one of several, has a line break."""
    if isinstance(value, tuple):
        return any(map(has_line_break, value))
    if isinstance(value, dict):
        return has_line_break(tuple(value.values()))
    return "".join(str(value).splitlines()) != str(value)


def directive(value: object) -> str:
    """Quote a value for an #SBATCH line, in which only double quotes and backslashes are special."""
    text = str(value)
    if text.isascii() and all(letter.isalnum() or letter in "/._-+:,=%@[]" for letter in text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@dataclass(frozen=True)
class Partition:
    """Nodes of one kind in a partition, as sinfo lists them: of GPUs those of the type that is asked for. Times are a
    job's longest, and the one that it has without --time."""

    name: str
    is_default: bool
    nodes: int
    gpus_per_node: int
    longest_time: str = "infinite"
    default_time: str = "n/a"


def partitions(gpu_type: str | None = None) -> list[Partition]:
    """Ask Slurm for the cluster's partitions. UserError when it does not answer."""
    asked = ask(["sinfo", "--noheader", "--format=%P|%D|%G|%l|%L"])
    if asked.returncode:
        raise UserError(f"sinfo does not answer, so nothing can be submitted from here: {asked.stderr.strip()}")
    kinds = [parse_partition(line, gpu_type) for line in asked.stdout.splitlines() if PARTITION.fullmatch(line.strip())]
    if not kinds:
        raise UserError(f"sinfo lists no partition, so nothing can be submitted from here: {asked.stdout.strip()!r}")
    return kinds


def ask(argv: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run a command and return how it ended. UserError when it takes more than PATIENCE_SECONDS. Variables such as
    SBATCH_EXPORT, which count more than a script's own lines, or SQUEUE_STATES do not reach it."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(VARIABLES)}
    try:
        return subprocess.run(
            argv, env=variables, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{' '.join(argv)}: no answer in {PATIENCE_SECONDS:g} s: does Slurm answer (squeue)?") from None


def parse_partition(line: str, gpu_type: str | None = None) -> Partition:
    """Parse a line of `sinfo --format=%P|%D|%G|%l|%L`, for example `gpu*|16|gpu:h100:8(S:0-1)|2-00:00:00|1:00:00`."""
    name, nodes, resources, *times = line.strip().split("|")
    gpus = sum(int(number) for kind, number in GPUS.findall(resources) if gpu_type in (None, kind))
    return Partition(name.rstrip("*"), name.endswith("*"), int(nodes), gpus, *times)


def kinds_of(partition: str | None, kinds: Sequence[Partition]) -> list[Partition]:
    """Return the kinds of nodes of the partitions that a job may run in. UserError when the cluster has none such."""
    names = sorted({kind.name for kind in kinds})
    chosen = partition or next((kind.name for kind in kinds if kind.is_default), None)
    if chosen is None:
        raise UserError(f"this cluster has no default partition: give --partition, one of {', '.join(names)}")
    own = [kind for kind in kinds if kind.name in chosen.split(",")]
    if not own:
        raise UserError(f"no partition {chosen}: give --partition, one of {', '.join(names)}")
    return own


def check_fits(
    partition: str | None, nodes: int, gpus_per_node: int, kinds: Sequence[Partition], gpu_type: str | None = None
) -> None:
    """UserError when the cluster has no such partition, or its nodes are too small or too few."""
    own = kinds_of(partition, kinds)
    chosen, gpus = ",".join(dict.fromkeys(kind.name for kind in own)), f"{gpu_type} GPUs" if gpu_type else "GPUs"
    most = max(kind.gpus_per_node for kind in own)
    if gpus_per_node > most:
        raise UserError(
            f"{gpus_per_node} {gpus} per node are more than a node of partition {chosen} has, {most}: change "
            "launch.processes_per_node or sampler.devices_per_node, and --nodes"
            + (", or launch.slurm.gpu_type" if gpu_type else "")
        )
    enough = sum(kind.nodes for kind in own if kind.gpus_per_node >= gpus_per_node)
    if nodes > enough:
        with_gpus = f" with {gpus_per_node} {gpus}" if gpus_per_node else ""
        raise UserError(f"{nodes} nodes{with_gpus} are more than partition {chosen} has, {enough}: ask for fewer")


def check_times(job: SlurmJob, kinds: Sequence[Partition]) -> None:
    """UserError when a job's time is more than its partitions allow, or the one that it has without --time too short.
    A quality of service may allow more."""
    own, time = kinds_of(job.option("partition"), kinds), job.option("time")
    longest = max(own, key=lambda kind: seconds_of(kind.longest_time) or math.inf)
    if time is None:
        limit = own[0].longest_time if own[0].default_time == "n/a" else own[0].default_time
        source = f"--time is not given, and that of partition {own[0].name}"
        check_time_limit(limit, source, job.config, bool(job.preflight_nodes))
        return
    asked = math.inf if time.lower() in UNLIMITED else seconds_of(time)
    if asked and asked > (seconds_of(longest.longest_time) or math.inf) and job.option("qos") is None:
        raise UserError(
            f"launch.slurm.time={time} is above the limit of partition {longest.name}, {longest.longest_time}, and the "
            "job would wait for ever: give less (--time), or another --partition"
        )


def checked_script(job: SlurmJob) -> str:
    """Return the script. UserError, before anything is written, for all faults that can be known here at once."""
    read = None if job.template == "bench" else keys_to_read(job)
    check_outside_files(job.config, read)
    check_inputs(job.config, job.run.root, job.workdir, read)
    if job.template != "bench":
        check_begun(job)
    if job.config.launch.slurm.secrets_file is not None:
        check_secrets_file(job.workdir / job.config.launch.slurm.secrets_file, job.run.root)
    check_cores(job)
    text = render(job)
    if shutil.which("sinfo") is not None:
        gpu_type = job.config.launch.slurm.gpu_type
        kinds = partitions(gpu_type)
        check_fits(job.option("partition"), job.nodes, job.gpus_per_node, kinds, gpu_type)
        check_times(job, kinds)
    return text


def keys_to_read(job: SlurmJob) -> set[str]:
    """Return the keys of the outside files that the stages which the job will make read."""
    stages = plan(job.config)
    made = [stage.name for stage in stages if job.run.manifest(stage.name) is not None]
    missing = [stage for stage in stages if stage.name not in made and stage.name in (job.stages or [stage.name])]
    return keys_read_by(missing, made, job.config, job.run)


def check_cores(job: SlurmJob) -> None:
    """UserError when a job that shares its nodes says of no cores that it needs: a cluster's own number is often one,
    for all processes of a node."""
    said = [job.config.launch.cores_per_node, *map(job.option, ("cpus-per-task", "cpus-per-gpu"))]
    whole = job.config.launch.slurm.exclusive or any(option.name == "exclusive" for option in job.options)
    if not whole and not any(said):
        raise UserError(
            "launch.slurm.exclusive=false, and no number of cores: set launch.cores_per_node, which all processes of a "
            "node share, or give --cpus-per-gpu=N in launch.slurm.sbatch_options"
        )


def check_begun(job: SlurmJob) -> None:
    """UserError when the run was begun with another configuration, on which `srlm run` would end. What is sampled is
    left to it: on CPUs the number of threads counts, which is that of the nodes."""
    stages, made, contents = plan(job.config), dict[str, Manifest](), dict[str, dict[str, str]]()
    for stage in stages:
        if (manifest := job.run.manifest(stage.name)) is not None:
            as_now = config_of(stage, job.config)
            made[stage.name] = replace(manifest, config=as_now) if stage.kind.samples else manifest
            contents[stage.name] = contents_of(stage, job.config, job.run.rubric_in_force)
    check_all_unchanged(stages, made, job.config, job.run, contents)


def check_secrets_file(file: Path, run: Path) -> None:
    """UserError, without a word of what is in it, for a file of secrets that others could read or a job could not."""
    key = f"launch.slurm.secrets_file {file}"
    if not file.is_file():
        raise UserError(f"{key}: there is no such file; write lines NAME=value into one, and chmod 600 it")
    if file.resolve().is_relative_to(run.resolve()):
        raise UserError(f"{key} is in the run, which is copied and shown: keep it elsewhere")
    if file.stat().st_uid != os.getuid() or file.stat().st_mode & 0o477 != 0o400:
        raise UserError(f"{key} cannot be read by you, or can be read by others than you: chmod 600 it")
    # Lines and names as the job's script takes them, which exports nothing else.
    for number, line in enumerate(re.split("\r?\n", file.read_bytes().decode(errors="replace")), start=1):
        if line.strip() and not line.startswith("#") and SECRET.fullmatch(line) is None:
            raise UserError(f"{key}, line {number} is not of the form NAME=value, without export and quotes")


def write_job(job: SlurmJob, text: str) -> Path:
    """Write the script, `text`, and the configuration and variables that it reads; return the script's path. UserError
    when Slurm refuses it."""
    job.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(job.config_file, to_yaml(job.config).encode())
    write_atomic(job.env_file, ENVIRONMENT.read_bytes())
    script = job.config_file.with_suffix(".sbatch")
    write_atomic(script, text.encode())
    check_by(["bash", "-n", str(script)])
    if shutil.which("sbatch") is not None:
        check_by(["sbatch", "--test-only", str(script)])
    return script


def jobs_in_queue(run: RunDir) -> list[str]:
    """Return this user's jobs of a run that wait or work, such as `12 (PENDING)`; none where there is no squeue."""
    if shutil.which("squeue") is None:
        return []
    asked = ask(["squeue", f"--user={os.getuid()}", "--noheader", "--format=%i|%T|%o"])
    rows = [row for line in asked.stdout.splitlines() if len(row := line.split("|", 2)) == 3]
    here = run.jobs.resolve()
    # Only a path that looks like one of ours is asked for on a disk.
    ours = [row for row in rows if Path(row[2]).parents[1:2] and Path(row[2]).parents[1].name == run.jobs.name]
    return [f"{number} ({state})" for number, state, path in ours if Path(path).resolve().is_relative_to(here)]


def check_by(argv: list[str]) -> None:
    """UserError when a command refuses the script."""
    done = ask(argv)
    if done.returncode:
        raise UserError(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()}")


def submit(script: Path) -> int:
    """Submit the script to Slurm and return the job's number. UserError when Slurm refuses it."""
    if shutil.which("sbatch") is None:
        raise UserError(f"there is no sbatch here. Submit it where there is: sbatch {shlex.quote(str(script))}")
    done = ask(["sbatch", "--parsable", str(script)])
    if done.returncode:
        raise UserError(f"sbatch {script}: {done.stderr.strip()}")
    number = JOB_NUMBER.search(done.stdout.strip())
    if number is None:
        raise UserError(f"sbatch {script}: its answer has no job number, look with squeue: {done.stdout.strip()!r}")
    return int(number[1])
