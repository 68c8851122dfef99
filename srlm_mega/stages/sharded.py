"""Sampling a stage's task in shards, with metrics, progress, and failed requests counted."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TypeVar

from srlm_mega.records import PromptTokens, SampledTexts, write_jsonl
from srlm_mega.sampling.sampling_rate import ShardWatch
from srlm_mega.sampling.shards import ShardFiles, cut_into_shards
from srlm_mega.seeds import derive_seed
from srlm_mega.stages.sampler_weights import sampled_model
from srlm_mega.stages.sampling_task import Sampled, SamplingTask, report_progress
from srlm_mega.stages.work import Work

T = TypeVar("T")
R = TypeVar("R")


def sample_in_shards(work: Work, task: SamplingTask[T]) -> None:
    """Sample a task into its file in the stage's output, with metrics.jsonl and (for failed requests) failed.jsonl next
    to it. CannotContinue when more than sampler.max_failed_share of the requests failed."""
    config, requests = work.config, [PromptTokens(one.id, one.token_ids) for one in task.requests]
    files = shard_files(work, requests, task.file)
    if not files.merged:
        watch = ShardWatch(
            work.out / "metrics.jsonl",
            partial(report_progress, work, task.unit),
            len(requests),
            config.sampler.devices_per_replica,
            config.sampler_replicas,
        )
        work.samplers.answer(sampled_model(work, task.model), files, task.params, watch)
        files.merge(partial(write_jsonl, records=records_of(task, files)))
        watch.close()
    files.tidy()


def records_of(task: SamplingTask[T], files: ShardFiles[PromptTokens]) -> Iterator[Sampled]:
    """Yield the records of all answers, in the order of the requests."""
    requests = {request.id: request for request in task.requests}
    for answered in files.read(SampledTexts):
        yield from task.records(requests[answered.id], answered.completions)


def shard_files(work: Work, requests: Sequence[R], file: str, each: int = 1) -> ShardFiles[R]:
    """Return the stage's shards, the same in every attempt. `each`: records of a request."""
    seed = derive_seed(work.config.run.seed, work.stage.name)
    shards = cut_into_shards(requests, work.config.sampler.requests_per_shard, seed)
    return ShardFiles(shards, work.out / file, failures_allowed(work, requests), each)


def failures_allowed(work: Work, requests: Sequence[object]) -> int:
    """Return how many requests of a stage may fail for good."""
    return int(work.config.sampler.max_failed_share * len(requests))
