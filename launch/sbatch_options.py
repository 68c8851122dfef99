"""Further options of sbatch: read as sbatch reads them, and refused by name where one would undo the job's own lines or
lose to them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from srlm_mega.config.launch import LaunchConfig, SlurmConfig
from srlm_mega.errors import UserError

OPTION = re.compile(r"--([a-z][a-z-]*)(?:[= ](.*))?|-([A-Za-z]) ?(.*)", re.DOTALL)
LETTERS = {
    "A": "account", "B": "extra-node-info", "C": "constraint", "D": "chdir", "F": "nodefile", "G": "gpus", "H": "hold",
    "J": "job-name", "L": "licenses", "M": "clusters", "N": "nodes", "O": "overcommit", "Q": "quiet", "S": "core-spec",
    "V": "version", "W": "wait", "a": "array", "b": "begin", "c": "cpus-per-task", "d": "dependency", "e": "error",
    "h": "help", "i": "input", "k": "no-kill", "m": "distribution", "n": "ntasks", "o": "output", "p": "partition",
    "q": "qos", "s": "oversubscribe", "t": "time", "v": "verbose", "w": "nodelist", "x": "exclude",
}  # fmt: skip
# Keys of launch.slurm, and the variables by which sbatch is told the same.
KEYS = {
    "partition": "SBATCH_PARTITION", "account": "SBATCH_ACCOUNT", "time": "SBATCH_TIMELIMIT", "qos": "SBATCH_QOS",
    "constraint": "SBATCH_CONSTRAINT", "reservation": "SBATCH_RESERVATION",
}  # fmt: skip
ALLOCATED = (
    "the job has one task per node; say launch.processes_per_node, sampler.num_devices and launch.slurm.gpu_type"
)
LOG = "the job's log is RUN/slurm/JOB.log, which srlm names and other files lie beside"
SUBMITS = "it is about the command sbatch; srlm launch slurm has --dry-run and --submit"
REFUSED = {
    "nodes": "give srlm launch slurm --nodes=N, since the layout follows from it",
    **dict.fromkeys(("ntasks", "ntasks-per-node", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-socket"), ALLOCATED),
    **dict.fromkeys(
        ("tres-per-task", "tasks-per-node", "gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task"), ALLOCATED
    ),
    "chdir": "start srlm launch slurm in that folder",
    "workdir": "start srlm launch slurm in that folder",
    "signal": "give launch.slurm.signal_seconds",
    "no-requeue": "a job that is never to be queued again has launch.slurm.max_restarts=0",
    **dict.fromkeys(("export", "export-file"), "give launch.slurm.environment, or launch.slurm.secrets_file"),
    **dict.fromkeys(("output", "error", "input", "open-mode"), LOG),
    "array": "a run is one job: its tasks would all work on it",
    "oversubscribe": "nodes are shared with launch.slurm.exclusive=false",
    "share": "nodes are shared with launch.slurm.exclusive=false",
    **dict.fromkeys(("wrap", "test-only", "wait", "parsable", "help", "usage", "version"), SUBMITS),
}
REPLACES = {
    "exclusive": "exclusive", "job-name": "job-name", "mem": "mem", "mem-per-cpu": "mem", "mem-per-gpu": "mem",
    "cpus-per-task": "cpus-per-task", "cpus-per-gpu": "cpus-per-task",
}  # fmt: skip


@dataclass(frozen=True)
class SbatchOption:
    """An option under its long name; None where it has no value."""

    name: str
    value: str | None

    def __str__(self) -> str:
        return f"--{self.name}" if self.value is None else f"--{self.name}={self.value}"


def read_options(slurm: SlurmConfig, variables: Mapping[str, str]) -> tuple[SbatchOption, ...]:
    """Return the options that a job's script has besides its own, those of keys first; what is not given is that of
    sbatch's variables. UserError for an option that is none, that the job's own lines contradict, or that has another
    value than its key."""
    given = [read_option(text) for text in slurm.sbatch_options]
    for option in given:
        check_option(option, slurm)
    values = {option.name: option.value for option in given if option.name in KEYS}
    for name in KEYS:
        own = vars(slurm)[name]
        if own is not None and values.setdefault(name, own) != own:
            raise UserError(
                f"launch.slurm.{name}={own}, and launch.slurm.sbatch_options has {SbatchOption(name, values[name])}: "
                "remove one of them"
            )
        if variables.get(KEYS[name]):
            values.setdefault(name, variables[KEYS[name]])
    of_keys = (SbatchOption(name, values[name]) for name in KEYS if name in values)
    return (*of_keys, *(option for option in given if option.name not in (*KEYS, "requeue")))


def read_option(text: str) -> SbatchOption:
    """Read `--name`, `--name=value`, `--name value`, `-C value` or `-Cvalue`. UserError for anything else."""
    match = OPTION.fullmatch(text.strip())
    letter = None if match is None else match[3]
    if match is None or (letter is not None and letter not in LETTERS):
        raise UserError(f"launch.slurm.sbatch_options: {text!r} is no option of sbatch: write each as --name=value")
    if letter is not None:
        return SbatchOption(LETTERS[letter], match[4].strip() or None)
    return SbatchOption(match[1], None if match[2] is None else match[2].strip())


def check_option(option: SbatchOption, slurm: SlurmConfig) -> None:
    """UserError, with the remedy, for an option that a job cannot have, and for a shortened name of one."""
    guarded = {*REFUSED, *KEYS, *REPLACES, "gres", "requeue", "time-min"}
    remedy = REFUSED.get(option.name)
    if option.name == "gres" and ("gpu" in (option.value or "") or slurm.gpu_option == "gres"):
        remedy = ALLOCATED + ", and launch.slurm.gpu_option=gpus-per-node where --gres has other things"
    if option.name == "requeue" and option.value is not None:
        remedy = "it has no value, and is in the job's script already"
    if option.name not in guarded and any(name.startswith(option.name) for name in guarded):
        remedy = "write its name in full"
    if remedy is not None:
        raise UserError(f"launch.slurm.sbatch_options: {option} cannot be given: {remedy}")


def replaced(options: Sequence[SbatchOption], launch: LaunchConfig) -> tuple[str, ...]:
    """Return the names of the script's own options that others take the place of."""
    own = ("job-name", "exclusive", "mem") if launch.slurm.exclusive else ("job-name", "cpus-per-task")
    others = {REPLACES.get(option.name) for option in options}
    return tuple(name for name in own if name in others and (name != "cpus-per-task" or launch.cores_per_node))
