"""Sampling a task in shards: in this process, or by replicas that share the shards."""

import os
import subprocess
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pkgutil import resolve_name
from typing import TypeVar

from srlm_mega.config.file import load_config
from srlm_mega.errors import CannotContinue, UserError, exit_code
from srlm_mega.launch.child_process import die_with, show_stacks_when_asked
from srlm_mega.launch.sampler_environment import devices_of, sampler_process
from srlm_mega.run.plan import find_stage
from srlm_mega.run.progress import Progress
from srlm_mega.run.run_dir import RunDir
from srlm_mega.run.work import Work
from srlm_mega.sampling.replicas import replica_progress, run_replicas
from srlm_mega.sampling.sampling_rate import ShardWatch
from srlm_mega.sampling.shards import ShardFiles, cut_into_shards, run_shards, take_shards
from srlm_mega.seeds import derive_seed
from srlm_mega.stages.sampler_weights import open_model
from srlm_mega.stages.sampling_task import SamplingTask, answer, report_progress

T = TypeVar("T")


def sample_in_shards(work: Work, task: SamplingTask[T]) -> None:
    """Sample a task into its file in the stage's output, with metrics.jsonl and (for failed requests) failed.jsonl next
    to it. CannotContinue when more than sampler.max_failed_share of the requests failed."""
    config, files = work.config, shard_files(work, task.requests, task.file)
    watch = ShardWatch(
        work.out / "metrics.jsonl",
        partial(report_progress, work, task.unit),
        len(task.requests),
        config.sampler.devices_per_replica,
        config.sampler_replicas,
    )
    if config.sampler_replicas > 1:
        run_replicas(files, partial(start_replica, work), config.sampler_replicas, watch)
    else:
        with closing(open_model(work, task.model, failures_allowed(work, task.requests))) as sampler:
            run_shards(files, partial(answer, task.params, task.records, sampler), watch.earlier, watch.finished)
    watch.close()


def start_replica(work: Work, number: int) -> "subprocess.Popen[bytes]":
    """Start `srlm replica` in the sampler's environment; it ends with this process."""
    threads = work.config.sampling_threads(work.config.sampler_replicas)
    return subprocess.Popen(
        sampler_process(work.config, ["replica", str(work.run.root), work.stage.name, str(number)]),
        stdin=subprocess.DEVNULL,
        preexec_fn=partial(die_with, os.getpid()),
        env=dict(os.environ) | devices_of(number, work.config) | {"OMP_NUM_THREADS": str(threads)},
    )


def work_as_replica(run: RunDir, stage_name: str, number: int) -> int:
    """Work on the shards of a stage that another process began, until all are finished. Returns the exit code; the
    message of a UserError or CannotContinue is left for that process."""
    config = load_config(run.config_file)
    stage = find_stage(config, stage_name)
    if stage.kind.requests is None:
        raise UserError(f"{stage_name} is not sampled in shards, so replicas have nothing to share")
    die_with(os.getppid())
    show_stacks_when_asked()
    progress = Progress(run.progress_file(f"{stage_name}.replica_{number}"))
    work = Work(run, config, stage, run.partial(stage_name), progress)
    task: SamplingTask[object]
    task, *_ = resolve_name(stage.kind.requests)(work)
    files = shard_files(work, task.requests, task.file)
    try:
        with closing(open_model(work, task.model, failures_allowed(work, task.requests))) as sampler:
            seconds = work.config.sampler.take_over_seconds
            take_shards(files, partial(answer, task.params, task.records, sampler), number, seconds)
    except (UserError, CannotContinue) as error:
        Progress(replica_progress(files.folder, number)).failed(exit_code(error), str(error))
        return exit_code(error)
    return 0


def shard_files(work: Work, requests: Sequence[T], file: str) -> ShardFiles[T]:
    """Return the stage's shards, which are the same in every process that works on them."""
    seed = derive_seed(work.config.run.seed, work.stage.name)
    shards = cut_into_shards(requests, work.config.sampler.shard_size, seed)
    return ShardFiles(shards, work.out / file, failures_allowed(work, requests))


def failures_allowed(work: Work, requests: Sequence[T]) -> int:
    """Return how many requests of a stage may fail for good."""
    return int(work.config.sampler.max_failed_share * len(requests))
