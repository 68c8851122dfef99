"""The self-rewarding loop: run the plan's stages that are not on disk yet, each as processes of its own.

This is the controller. It needs no torch and holds no GPU.
"""

import signal
import time
from contextlib import closing

from srlm_mega.config import Config
from srlm_mega.config.file import check_endpoints, check_outside_files, to_yaml
from srlm_mega.controller.background_report import BackgroundReport
from srlm_mega.controller.display import Display
from srlm_mega.controller.stage_commands import check_sampler, command, comparison_commands, starts
from srlm_mega.controller.stage_process import StageProcess, explain_failure, started
from srlm_mega.controller.stall_watchdog import StallWatchdog, stall_seconds
from srlm_mega.errors import StopRequested, TrainingPaused, UserError
from srlm_mega.launch.ranks import allocation_for
from srlm_mega.run.files import write_atomic
from srlm_mega.run.identity import check_unchanged
from srlm_mega.run.plan import Stage, downstream, find_stage, plan
from srlm_mega.run.presence import announced
from srlm_mega.run.progress import read_progress
from srlm_mega.run.provenance import provenance
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.stop_signals import PREEMPTION, on_signals

POLL_SECONDS = 0.1


def run_loop(config: Config, run: RunDir, redo: tuple[str, ...], display: Display, only: tuple[str, ...] = ()) -> int:
    """Make every output of the plan that is not there yet, in order, or those of `only`; returns how many were made.

    StopRequested after a stop signal, Ctrl-C, or when somebody made the stop file.
    """
    stages = plan(config)
    doomed = {name for chosen in redo for name in downstream(stages, find_stage(config, chosen).name)}
    if config.launch.launcher == "slurm":
        allocation_for(config.launch.nodes)
    if run.manifest("seed") is None:
        check_outside_files(config)
    with run.lock():
        check_finished([stage for stage in stages if stage.name not in doomed], config, run)
        for stage in reversed(stages):  # what comes last goes first: a kill in between leaves a run that can resume
            if stage.name in doomed and run.remove(stage.name):
                display.say(f"removed {run.output(stage.name)}")
        wanted = [find_stage(config, name) for name in only] or stages
        missing = [stage for stage in stages if stage in wanted and run.manifest(stage.name) is None]
        check_inputs(missing, run)
        if not missing:
            return 0
        check_endpoints(config)
        check_sampler(missing, config)
        write_atomic(run.config_file, to_yaml(config).encode())
        write_atomic(run.provenance_file, provenance())
        run.report_file.unlink(missing_ok=True)  # it will be out of date
        run.stop_file.unlink(missing_ok=True)  # of the run that was stopped
        with (
            on_signals((*PREEMPTION, signal.SIGINT), run.stop_file.touch),
            announced(run),
            closing(BackgroundReport(run)) as report,
        ):
            for group in together(stages, missing, config):
                run_group(group, config, run, display, report)
        check_finished(stages, config, run)
        return len(missing)


def together(stages: list[Stage], missing: list[Stage], config: Config) -> list[list[Stage]]:
    """The missing stages in order; those that follow one another and start in the same way share their processes, so
    that torch is loaded, and ranks meet, once for all of them."""
    groups: list[list[Stage]] = []
    previous: Stage | None = None
    for stage in stages:
        if stage in missing:
            if previous in missing and previous is not None and starts(previous, config) == starts(stage, config):
                groups[-1].append(stage)
            else:
                groups.append([stage])
        previous = stage
    return groups


def check_inputs(missing: list[Stage], run: RunDir) -> None:
    """UserError unless what these stages read is there, or is made before them."""
    made: set[str] = set()
    for stage in missing:
        absent = [name for name in stage.inputs if name not in made and run.manifest(name) is None]
        if absent:
            raise UserError(f"{stage.name} reads {', '.join(absent)}, not finished in {run.root}: make them first")
        made.add(stage.name)


def check_finished(stages: list[Stage], config: Config, run: RunDir) -> None:
    """Everything on disk must be whole, and be what this configuration makes. What a killed commit left goes."""
    for stage in stages:
        if run.manifest(stage.name) is not None:
            run.verify(stage.name, quick=True)
            check_unchanged(stage, config, run)
            run.remove_leftovers(stage.name)


def run_group(group: list[Stage], config: Config, run: RunDir, display: Display, report: BackgroundReport) -> None:
    """Run stages that share their processes to their end. Whenever a training among them pauses, its newest checkpoint
    is compared, and it resumes."""
    while group:
        try:
            execute(group, config, run, display, report)
        except TrainingPaused:
            group = [stage for stage in group if run.manifest(stage.name) is None]
            compare_checkpoints(group[0], config, run, display)
        else:
            return


def execute(group: list[Stage], config: Config, run: RunDir, display: Display, report: BackgroundReport) -> None:
    """Run stages that share their processes, showing how far each is. TrainingPaused when one of them waits for a
    comparison."""
    for stage in group:
        run.progress_file(stage.name).unlink(missing_ok=True)
    with started(command(group, config, run), group[0].name, config, run) as process:
        for stage in group:
            watchdog = StallWatchdog(
                stage.name, run.partial(stage.name), process.log_place, stall_seconds(stage, config)
            )
            if not watch(stage, process, run, display, watchdog):
                explain_failure(stage.name, process, run)
            report.refresh()
        process.wait_for_end()


def compare_checkpoints(stage: Stage, config: Config, run: RunDir, display: Display) -> None:
    """What a paused training waits for, in processes where the sampler and the judge can be reached."""
    name = f"{stage.name}/early_stopping"
    for start in comparison_commands(stage, config, run):
        run.progress_file(name).unlink(missing_ok=True)
        begin = time.monotonic()
        with started(start, name, config, run) as process, display.stage(name) as line:
            minutes = config.runtime.progress_timeout_minutes
            watchdog = StallWatchdog(name, run.partial(stage.name), process.log_place, 60 * minutes)
            while process.poll() is None:
                check_not_stopped(name, run)
                state = read_progress(run.progress_file(name))
                line.update(state)
                watchdog.check(state, process.pid)
                time.sleep(POLL_SECONDS)
            if process.poll() != 0:
                explain_failure(name, process, run)
        display.finished(name, 0, time.monotonic() - begin)


def watch(stage: Stage, process: StageProcess, run: RunDir, display: Display, watchdog: StallWatchdog) -> bool:
    """Show a stage's progress until its output is there; False when the process ended without it. StopRequested when
    asked to stop in a stage that does not train: such a one loses little and is ended at once. StageCrashed when
    it shows no progress for too long."""
    start = time.monotonic()
    with display.stage(stage.name) as line:
        while True:
            ended = process.poll() is not None  # asked before the output, which may appear in between
            manifest = run.manifest(stage.name)
            if manifest is not None or ended:
                break
            if not stage.kind.trains:
                check_not_stopped(stage.name, run)
            state = read_progress(run.progress_file(stage.name))
            line.update(state)
            watchdog.check(state, process.pid)
            time.sleep(POLL_SECONDS)
    if manifest is not None:
        display.finished(stage.name, manifest.rows, time.monotonic() - start)
    return manifest is not None


def check_not_stopped(name: str, run: RunDir) -> None:
    """StopRequested when somebody asked to stop."""
    if run.stop_file.exists():
        raise StopRequested(f"{name} was ended. What is finished is kept, and the same command resumes the run")
