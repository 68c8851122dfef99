"""The self-rewarding loop: run the plan's stages that are not on disk yet, each as processes of its own.

This is the controller. It needs no torch and holds no GPU.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from srlm_mega.config import Config
from srlm_mega.config_file import to_yaml
from srlm_mega.display import Display
from srlm_mega.errors import STOPPED, USER_ERROR, RunStopped, StageCrashed, UserError
from srlm_mega.launch.commands import environment, one_process, torchrun
from srlm_mega.plan import Stage, check_unchanged, downstream, plan
from srlm_mega.progress import read_progress
from srlm_mega.provenance import provenance
from srlm_mega.run_dir import RunDir, write_atomic

POLL_SECONDS = 0.1
LOG_TAIL_LINES = 15


def run_loop(config: Config, run: RunDir, redo: tuple[str, ...], display: Display) -> int:
    """Make every output of the plan that is not there yet, in order; returns how many were made."""
    with run.lock():
        stages = plan(config)
        for name in redo:
            start_again(stages, name, run, display)
        check_finished(stages, config, run)
        missing = [stage for stage in stages if run.manifest(stage.name) is None]
        if not missing:
            return 0
        write_atomic(run.config_file, to_yaml(config).encode())
        write_atomic(run.provenance_file, provenance())
        for stage in stages:
            if stage in missing:
                execute(stage, config, run, display)
            check_unchanged(stage, config, run)
        return len(missing)


def start_again(stages: list[Stage], name: str, run: RunDir, display: Display) -> None:
    """Remove a stage's output and everything made from it."""
    if name not in {stage.name for stage in stages}:
        raise UserError(f"--redo {name}: no such stage. Stages: " + ", ".join(stage.name for stage in stages))
    for doomed in downstream(stages, name):
        run.remove(doomed)
        display.say(f"removed {run.output(doomed)}")


def check_finished(stages: list[Stage], config: Config, run: RunDir) -> None:
    """Everything on disk must be whole, and be what this configuration makes."""
    for stage in stages:
        if run.manifest(stage.name) is not None:
            run.verify(stage.name, quick=True)
            check_unchanged(stage, config, run)


def execute(stage: Stage, config: Config, run: RunDir, display: Display) -> None:
    """Run one stage to its end, showing how far it is."""
    progress_file, log_file = run.progress_file(stage.name), run.log_file(stage.name)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    progress_file.unlink(missing_ok=True)
    start = time.monotonic()
    with log_file.open("ab") as log, display.stage(stage.name) as line:
        process = subprocess.Popen(
            command(stage, config, run.root),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(dict(os.environ), config.launch.threads_per_process),
        )
        try:
            while process.poll() is None:
                line.update(read_progress(progress_file))
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        explain_failure(stage, process.returncode, run)
    manifest = run.manifest(stage.name)
    assert manifest is not None, f"{stage.name} ended well without an output: see {log_file}"
    display.finished(stage.name, manifest.rows, time.monotonic() - start)


def command(stage: Stage, config: Config, run: Path) -> list[str]:
    """The argv of a stage; `srlm` and `torchrun` are the ones beside this Python."""
    bin_dir = Path(sys.executable).parent
    if stage.parallel:
        return torchrun(bin_dir, stage.name, run, config.launch.processes_per_node)
    return one_process(bin_dir, stage.name, run)


def explain_failure(stage: Stage, code: int, run: RunDir) -> None:
    """Raise what the stage said about its end, or show the end of its log."""
    said = read_progress(run.progress_file(stage.name))
    if said.exit_code == STOPPED:
        raise RunStopped(f"{stage.name}: {said.message}")
    if said.exit_code == USER_ERROR:
        raise UserError(f"{stage.name}: {said.message}")
    log_file = run.log_file(stage.name)
    tail = log_file.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    raise StageCrashed(f"{stage.name} ended with exit code {code}. The end of {log_file}:\n" + "\n".join(tail))
