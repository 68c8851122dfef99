"""Running stages in this process: begin an output, call the function of the stage's kind, commit the output."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from importlib.metadata import version
from pkgutil import resolve_name

from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.errors import (
    CRASHED,
    PAUSED,
    CannotContinue,
    StageCrashed,
    StopRequested,
    TrainingPaused,
    UserError,
    exit_code,
    naming,
    reason,
)
from srlm_mega.launch.child_process import die_with_parent, show_stacks_when_asked
from srlm_mega.run.identity import identity_of
from srlm_mega.run.plan import Stage, find_stage
from srlm_mega.run.progress import Progress
from srlm_mega.run.run_dir import RunDir, stopwatch
from srlm_mega.sampling.samplers import Samplers
from srlm_mega.stages.work import Done, Work
from srlm_mega.text import on_one_screen


def run_stages(run: RunDir, names: Sequence[str]) -> int:
    """Make outputs in the given order until one cannot be made. Returns the exit code (0 when all were made)."""
    die_with_parent()
    show_stacks_when_asked()
    config = load_config(run.config_in_force)
    stages = [find_stage(config, name) for name in names]
    # The first of the ranks holds the lock for all. Who is refused leaves the progress files to those who work here.
    with run.lock(or_by_starter=True) if is_first(stages) else nullcontext():
        return make(run, config, stages)


def is_first(stages: Sequence[Stage]) -> bool:
    """Tell whether this process makes the stages alone, or is the first of torchrun's ranks."""
    if not any(stage.kind.parallel for stage in stages):
        return True
    import torch

    # Before megatron-core is imported: its decorators call torch.compile there and then, and to load the default
    # backend, inductor, is a quarter of a process's start. On a CPU none of those functions is ever called.
    if not torch.cuda.is_available():
        torch.compiler.set_default_backend("eager")
    from srlm_mega.training.topology import started_as

    return started_as() == 0


def make(run: RunDir, config: Config, stages: Sequence[Stage]) -> int:
    """Make the stages' outputs, as `run_stages` says."""
    try:
        with joined_ranks(config, stages), closing(Samplers(config, run.replicas)) as samplers:
            codes = (run_stage(run, samplers, stage) for stage in stages)
            code = next((code for code in codes if code), 0)
            return 0 if code == PAUSED else code  # torchrun would report a failure; the progress file says what it is
    except UserError as error:
        return record_failure(error, Progress(run.progress_file(stages[0].name)))
    except StageCrashed as error:  # the ranks' rendezvous failed
        Progress(run.progress_file(stages[0].name)).failed(CRASHED, str(error))
        print(error, flush=True)
        return CRASHED


def joined_ranks(config: Config, stages: Sequence[Stage]) -> AbstractContextManager[object]:
    """Return a context in which torchrun's ranks share one process group for all stages, if any is parallel."""
    if not any(stage.kind.parallel for stage in stages):
        return nullcontext()
    from srlm_mega.training.topology import process_group

    return process_group(config.trainer)


def run_stage(run: RunDir, samplers: Samplers, stage: Stage) -> int:
    """Make one output, with the models that this process samples. Returns the exit code; the message of an explained
    error is in the progress file."""
    progress = Progress(run.progress_file(stage.name))
    try:
        if run.manifest(stage.name) is not None:
            raise UserError(f"{run.output(stage.name)} is finished. Make it again: srlm run ... {run.redo(stage.name)}")
        work = Work(run, samplers.config, stage, run.partial(stage.name), progress, samplers)
        with naming(work.out):  # where nothing says which of its files it was
            if stage.kind.parallel:
                run_parallel(work)
            else:
                run_single(work)
    except (UserError, CannotContinue, StopRequested, TrainingPaused, OSError) as error:
        return record_failure(error, progress)
    return 0


def record_failure(error: Exception, progress: Progress) -> int:
    """Write an error's reason to the progress file and return its exit code. An error without a code is re-raised."""
    code = exit_code(error)
    if code == CRASHED:
        raise error
    with suppress(OSError):  # on a full disk the log and the exit code have to do
        progress.failed(code, reason(error))
    with suppress(OSError):  # and where the log fails, the progress file
        print(on_one_screen(reason(error)), flush=True)
    return code


def run_single(work: Work) -> None:
    """Run a stage in this process."""
    function: Callable[[Work], Done] = resolve_name(work.stage.kind.function)
    with output(work) as done:
        done.append(function(work))


def run_parallel(work: Work) -> None:
    """Run a stage in all ranks of a torchrun job; the main rank owns the output."""
    from srlm_mega.training.topology import Topology, watched

    def stuck(message: str) -> None:
        work.progress.failed(CRASHED, message)

    function: Callable[[Work, Topology], Done] = resolve_name(work.stage.kind.function)
    trainer = work.config.trainer
    with (
        Topology.start(work.config.parallel, trainer, work.config.run.seed) as started,
        watched(started, trainer, stuck) as topology,
    ):
        if topology.is_main:
            with output(work) as done:
                topology.barrier()
                done.append(function(work, topology))
        else:
            topology.barrier()
            function(work, topology)


@contextmanager
def output(work: Work) -> Iterator[list[Done]]:
    """Verify the inputs, begin the output, and commit it with the Done that the block appends to the yielded list."""
    done: list[Done] = []
    identity = identity_of(work.stage, work.config, work.run)
    for name in work.stage.inputs:
        work.run.verify(name, quick=False)
    work.run.begin(identity, resumable=work.stage.kind.resumable)
    with stopwatch() as seconds:
        yield done
    work.run.commit(identity, done[0].rows, seconds[0], version("srlm-mega"), done[0].counts)
