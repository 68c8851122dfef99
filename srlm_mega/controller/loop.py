"""The self-rewarding loop: run the plan's stages that are not on disk yet, each as processes of its own.

This is the controller. It needs no torch and holds no GPU.
"""

import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass

from srlm_mega.config import Config
from srlm_mega.config.compatibility import CONTENT, edited
from srlm_mega.config.file import to_yaml
from srlm_mega.controller.background_report import BackgroundReport
from srlm_mega.controller.display import Display
from srlm_mega.controller.stage_process import (
    StageProcess,
    comparison_command,
    launch_mode,
    raise_failure,
    stage_command,
    started,
)
from srlm_mega.controller.stall_watchdog import StallWatchdog, stall_seconds
from srlm_mega.controller.start_checks import check_start, rubric_for
from srlm_mega.data.repeats import warnings_on
from srlm_mega.errors import CannotContinue, StopRequested, TrainingPaused, UserError
from srlm_mega.launch.cores import with_cores
from srlm_mega.launch.ranks import allocation_for
from srlm_mega.run.identity import check_all_unchanged, config_of, contents_of
from srlm_mega.run.manifest import Manifest
from srlm_mega.run.plan import Stage, downstream, find_stage, plan
from srlm_mega.run.presence import announced
from srlm_mega.run.progress import read_progress
from srlm_mega.run.provenance import provenance
from srlm_mega.run.removal import told
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.sealed_file import seal_of
from srlm_mega.run.stop_signals import PREEMPTION, on_signals

POLL_SECONDS = 0.1


def run_loop(
    config: Config,
    run: RunDir,
    redo: tuple[str, ...],
    display: Display,
    only: tuple[str, ...] = (),
    agreed: Callable[[str], bool] | None = None,
    dry: bool = False,
) -> int:
    """Make every output of the plan that is missing, in order, or those of `only`; return how many were made. `dry`
    does what comes before the first stage, changes nothing, and says what would be done.

    Outputs of `redo`, and all that was made from them, are removed first, unless `agreed` is asked and says no.
    StopRequested then, after a stop signal, Ctrl-C, or when somebody made the stop file.
    """
    config = with_cores(config, run)
    stages = plan(config)
    redone = {name for chosen in redo for name in downstream(stages, find_stage(config, chosen).name)}
    if config.launch.launcher == "slurm" and not dry:
        allocation_for(config.launch.nodes)
    run.check_folder()
    # What cannot be made is refused before there is a folder.
    planned = None if run.config_file.is_file() else what_to_make(config, run, redone, only)
    with nullcontext() if dry else run.lock():
        if not dry:
            run.sweep(stage.name for stage in stages)
        if planned is None or run.config_file.is_file():  # another command may have begun the run
            planned = what_to_make(config, run, redone, only)
        finished, missing = planned
        made = finished.manifests
        for line in edited_files(stages, finished, config, run):
            display.print_line(line)
        doomed = [stage for stage in reversed(stages) if stage.name in redone and run.has(stage.name)]
        if doomed:
            facts = told(run.root, [stage.name for stage in reversed(doomed)])
            display.print_line(f"--redo {' --redo '.join(redo)} removes {facts}")
            if not dry and agreed is not None and not agreed("Remove and make again?"):
                raise StopRequested("--redo was declined: nothing was removed or changed")
        if dry:
            names = ", ".join(stage.name for stage in missing)
            display.print_line(f"would make {names}" if names else "would make nothing: every stage is finished")
            return 0
        for name in made:
            run.remove_leftovers(name)
        for stage in doomed:  # the last one goes first: a kill in between leaves a run that can resume
            if said := run.remove(stage.name, redone):
                display.print_line(said)
        run.stop_file.unlink(missing_ok=True)  # left by the request that ended the run before, or came as it ended
        if not missing:
            return 0
        with (
            attempted(config, run, at_once=bool(doomed) or not made, has_seed="seed" in made),
            on_signals((*PREEMPTION, signal.SIGINT), run.stop_file.touch),
            announced(run),
            closing(BackgroundReport(run)) as report,
        ):
            for group in stage_groups(stages, missing, config):
                run_group(group, config, run, display, report)
        check_finished(stages, config, run)
        return len(missing)


@dataclass(frozen=True)
class Finished:
    """Finished outputs that stay: their manifests, and the hashes of the outside files that they read, as these are
    now; both by stage."""

    manifests: Mapping[str, Manifest]
    contents: Mapping[str, Mapping[str, str]]


def what_to_make(
    config: Config, run: RunDir, redone: Collection[str], only: Sequence[str]
) -> tuple[Finished, list[Stage]]:
    """Return the finished outputs that stay, and the stages to be made, in order; change nothing. UserError for all
    that can be known to go wrong now."""
    stages = plan(config)
    finished = check_finished(stages, config, run, redone)
    made = finished.manifests
    wanted = [find_stage(config, name) for name in only] or stages
    missing = [stage for stage in stages if stage in wanted and stage.name not in made]
    check_inputs(missing, made.keys(), run)
    if missing:
        check_start(missing, frozenset(made), config, run, redone)
    return finished, missing


@contextmanager
def attempted(config: Config, run: RunDir, at_once: bool, has_seed: bool) -> Iterator[None]:
    """Let the stages of the block work by this configuration. It becomes the run's with the first output, `at_once`, or
    when it is the run's already; without an output a failed attempt leaves the run as it was. The judge's template is
    taken with it, where it is another than the one that the run has; stage `seed` keeps the first one."""
    run.drop_attempt()  # a killed one's
    text, rubric = to_yaml(config).encode(), rubric_for(config, run) if has_seed else None
    if not has_seed:
        run.rubric_file.unlink(missing_ok=True)
        seal_of(run.rubric_file).unlink(missing_ok=True)
    elif rubric == run.rubric_in_force:
        rubric = None
    same = rubric is None and run.config_file.is_file() and run.config_file.read_bytes() == text
    run.begin_attempt(text, provenance(), at_once or same, rubric)
    try:
        yield
    except CannotContinue:  # the commands that it may name, for each node, work by this configuration
        raise
    except BaseException:
        run.drop_attempt()
        raise


def stage_groups(stages: list[Stage], missing: list[Stage], config: Config) -> list[list[Stage]]:
    """Return the missing stages in order, in groups. Stages that follow one another and start in the same way share
    their processes, so that torch is loaded, and ranks rendezvous, once for all of them."""
    groups: list[list[Stage]] = []
    previous: Stage | None = None
    for stage in stages:
        if stage in missing:
            same = previous is not None and launch_mode(previous, config) == launch_mode(stage, config)
            if same and previous in missing:
                groups[-1].append(stage)
            else:
                groups.append([stage])
        previous = stage
    return groups


def check_inputs(missing: list[Stage], finished: Collection[str], run: RunDir) -> None:
    """Raise UserError unless what these stages read is finished, or is made before them."""
    made = set(finished)
    for stage in missing:
        absent = [name for name in stage.inputs if name not in made]
        if absent:
            raise UserError(f"{stage.name} reads {', '.join(absent)}, not finished in {run.root}: make them first")
        made.add(stage.name)


def check_finished(stages: list[Stage], config: Config, run: RunDir, redone: Collection[str] = ()) -> Finished:
    """Return what is finished and not to be `redone`. UserError unless it is whole and is what this configuration
    makes."""
    read = {stage.name: run.verified(stage.name) for stage in stages if stage.name not in redone}
    made = {name: manifest for name, manifest in read.items() if manifest is not None}
    rubric = rubric_for(config, run) if made else None
    contents = {stage.name: contents_of(stage, config, rubric) for stage in stages if stage.name in made}
    check_all_unchanged(stages, made, config, run, contents)
    return Finished(made, contents)


def edited_files(stages: Sequence[Stage], finished: Finished, config: Config, run: RunDir) -> Iterator[str]:
    """Yield a line for each outside file whose content is another than the one that finished stages were made from,
    unless a later round was made from it as it is now."""
    readers: dict[str, list[str]] = {}
    made, contents = finished.manifests, finished.contents
    taken = {(key, value) for manifest in made.values() for key, value in manifest.config.items() if CONTENT in key}
    for stage in stages:
        now = {**config_of(stage, config), **contents.get(stage.name, {})}
        for key, path in edited(made[stage.name].config, now).items() if stage.name in made else ():
            if (key + CONTENT, now[key + CONTENT]) not in taken:
                readers.setdefault(path, []).append(stage.name)
    for path, names in readers.items():
        yield (
            f"{path} was edited since {', '.join(names)} {'was' if len(names) == 1 else 'were'} made from it. What is "
            f"finished stays as it is, stages to come read the new content; {run.redo(names[0])}, begins there again"
        )


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
    """Run stages that share their processes, with a bar for each. TrainingPaused when one of them waits for a
    comparison."""
    for stage in group:
        run.progress_file(stage.name).unlink(missing_ok=True)
    as_ranks = group[0].kind.parallel
    with started(stage_command(group, config, run), group[0].name, config, run, as_ranks) as process:
        for stage in group:
            limit = stall_seconds(stage, config)
            watchdog = StallWatchdog(stage.name, run.partial(stage.name), process.log_path, limit)
            seconds = watch(stage.name, process, run, display, watchdog, stoppable=not stage.kind.trains)
            manifest = run.manifest(stage.name)
            if manifest is None:
                raise_failure(stage.name, process, run)
            display.finished(stage.name, manifest.rows, seconds)
            for warning in warnings_on(manifest.counts):
                display.print_line(warning)
            report.refresh()


def compare_checkpoints(stage: Stage, config: Config, run: RunDir, display: Display) -> None:
    """Compare a paused training's newest checkpoint, in processes that reach the sampler and the judge."""
    name = f"{stage.name}/early_stopping"
    run.progress_file(name).unlink(missing_ok=True)
    with started(comparison_command(stage, config, run), name, config, run, as_ranks=False) as process:
        limit = 60 * config.runtime.progress_timeout_minutes
        watchdog = StallWatchdog(name, run.partial(stage.name), process.log_path, limit)
        seconds = watch(name, process, run, display, watchdog, stoppable=True)
        if process.popen.poll() != 0:
            raise_failure(name, process, run)
    display.finished(name, 0, seconds)


def watch(
    name: str, process: StageProcess, run: RunDir, display: Display, watchdog: StallWatchdog, stoppable: bool
) -> float:
    """Show the progress of a stage until its output is there, or of a comparison, which has none, until its process
    ends; return the seconds that this took. StageCrashed when there is no progress for too long. StopRequested when
    asked to stop what is `stoppable`: it loses little and is ended at once, while training saves a checkpoint."""
    start = time.monotonic()
    with display.stage(name) as show:
        while run.manifest(name) is None and process.popen.poll() is None:
            if stoppable and run.stop_file.exists():
                raise StopRequested(f"{name} was ended. What is finished is kept, and the same command resumes the run")
            state = read_progress(run.progress_file(name))
            show(state)
            watchdog.check(state, process.popen.pid)
            time.sleep(POLL_SECONDS)
    return time.monotonic() - start
