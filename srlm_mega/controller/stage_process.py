"""The processes of stages: how they start, what they print, and why they ended."""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import ENOSPC
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

from srlm_mega.config import Config
from srlm_mega.errors import CANNOT_CONTINUE, ENDS, CannotContinue, StageCrashed, is_full, reason
from srlm_mega.launch.child_process import die_with, environment
from srlm_mega.launch.ranks import Start, start_one, start_ranks
from srlm_mega.launch.sampler_environment import (
    check_sampler_environment,
    sampler_process,
    sampler_variables,
    stop_container,
    stop_containers,
)
from srlm_mega.run.plan import Stage
from srlm_mega.run.progress import read_progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.sampling.replicas import terminate

LOG_TAIL_LINES = 15
EXIT_TIMEOUT_SECONDS = 60.0
TORCHRUN_REPORT = "torch/distributed/elastic/multiprocessing/api.py"


def launch_mode(stage: Stage, config: Config) -> Literal["as ranks", "here", "in the sampler's environment"]:
    """Return how a stage's process starts. One that samples starts replicas in the sampler's environment from here."""
    if stage.kind.parallel:
        return "as ranks"
    return "in the sampler's environment" if stage.kind.converts and config.sampler.elsewhere else "here"


def check_sampler(missing: Sequence[Stage], config: Config) -> None:
    """Raise UserError before hours of training, and not after them, if the sampler's environment cannot be entered."""
    if config.sampler.elsewhere and any(stage.kind.samples or stage.kind.converts for stage in missing):
        check_sampler_environment(config)


def stage_command(group: list[Stage], config: Config, run: RunDir) -> Start:
    """Return the command of stages that share their processes; `srlm` and `torchrun` are those next to this Python."""
    names = [stage.name for stage in group]
    arguments = ["stage", str(run.root), *names]
    match launch_mode(group[0], config):
        case "as ranks":
            return start_ranks(config, run, names[0], arguments, run.config_in_force)
        case "in the sampler's environment":
            return Start(sampler_process(config, arguments))
        case "here":
            samples = any(stage.kind.samples for stage in group)
            return start_one(config, run, names[0], arguments, starts_steps=samples and config.starts_replicas)


def comparison_command(stage: Stage, config: Config, run: RunDir) -> Start:
    """Return the command that compares a paused training's checkpoints. Its process starts replicas in the sampler's
    environment, and asks an endpoint itself, as compute nodes often reach nothing outside."""
    arguments = ["compare-checkpoints", str(run.root), stage.name]
    name = f"{stage.name}/early_stopping"
    return start_one(config, run, name, arguments, starts_steps=config.starts_replicas)


@dataclass(frozen=True)
class StageProcess:
    """A process and its output: `log_file`, where earlier attempts' output takes the first `earlier_bytes`, and for a
    step on several nodes a file per node in `node_logs`."""

    popen: subprocess.Popen[bytes]
    log_file: Path
    earlier_bytes: int
    node_logs: Path | None

    @property
    def log_path(self) -> Path:
        """The file or folder in which a person finds the output."""
        return self.node_logs or self.log_file

    def log_tail(self) -> str:
        """Return the last lines that each node printed."""
        texts = {self.log_file: self.log_file.read_bytes()[self.earlier_bytes :].decode(errors="replace")}
        if self.node_logs is not None:
            texts |= {path: path.read_text(errors="replace") for path in sorted(self.node_logs.glob("*.log"))}
        return "\n".join(
            "\n".join([f"The end of {path}:", *last_lines(text)])
            for path, text in texts.items()
            if text or path == self.log_file
        )


def last_lines(text: str) -> list[str]:
    """Return the last 15 lines that ranks printed. torchrun's own report, which follows, is longer and says less."""
    lines = text.splitlines()
    reports = [number for number, line in enumerate(lines) if TORCHRUN_REPORT in line]
    return lines[: reports[0] if reports else None][-LOG_TAIL_LINES:]


@contextmanager
def started(start: Start, name: str, config: Config, run: RunDir, as_ranks: bool) -> Iterator[StageProcess]:
    """Start a process, with the variables of training's ranks or of samplers, which logs to the log of `name`. When the
    block is done, it has a minute to end.

    It is a session of its own, so that what is sent to this one, such as Ctrl-C, reaches it as the stop file only:
    torchrun would give its ranks no time for a checkpoint.
    """
    log_file = run.log_file(name)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    if start.logs is not None:
        start.logs.mkdir(parents=True, exist_ok=True)
    cpu, threads, one_node = config.trainer.device == "cpu", config.training_threads, config.launch.nodes == 1
    here = environment(os.environ, threads, cpu, one_node) if as_ranks else sampler_variables(os.environ, config, None)
    stop_container(start.argv)  # one whose client was killed
    with log_file.open("ab") as log:
        earlier_bytes = log.tell()
        process = subprocess.Popen(
            start.argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(die_with, os.getpid()),
            env=here,
        )
        try:
            yield StageProcess(process, log_file, earlier_bytes, start.logs)
            with suppress(subprocess.TimeoutExpired):
                process.wait(EXIT_TIMEOUT_SECONDS)
        finally:
            if process.poll() is None:
                terminate([process])
                stop_containers(config)
            run.drop_replicas()


def raise_failure(name: str, process: StageProcess, run: RunDir) -> NoReturn:
    """Raise the error by which a stage or a comparison explained its end, else StageCrashed with the end of its log."""
    code = process.popen.wait()
    state = read_progress(run.progress_file(name))
    if state.exit_code in ENDS:
        raise ENDS[state.exit_code](f"{name}: {state.message}")
    if state.message:
        raise StageCrashed(f"{name}: {state.message}. The stacks of all ranks are in {process.log_path}")
    how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
    if is_full(run.root):  # it could not say so itself
        raise CannotContinue(f"{name} ended with {how}. {reason(OSError(ENOSPC, os.strerror(ENOSPC), run.root))}")
    kind = CannotContinue if code == CANNOT_CONTINUE else StageCrashed
    raise kind(f"{name} ended with {how}. {process.log_tail()}")
