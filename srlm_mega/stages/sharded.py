"""A stage that samples a fixed list of requests, in shards: in this process, or by replicas that share the shards."""

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

from srlm_mega.chat import Chat
from srlm_mega.errors import RunStopped, UserError, exit_code
from srlm_mega.judging.scores import parse_score
from srlm_mega.launch.child_process import die_with, show_stacks_when_asked
from srlm_mega.launch.sampler_environment import devices_of, sampler_process
from srlm_mega.progress import Progress
from srlm_mega.records import Candidate, Decoding, FailedRequest, Judgement, MetaJudgement
from srlm_mega.sampling.replicas import replica_progress, run_replicas
from srlm_mega.sampling.retries import PatientSampler
from srlm_mega.sampling.sampler import Completion, SamplingParams
from srlm_mega.sampling.shards import (
    Answered,
    Shard,
    ShardFiles,
    ShardReport,
    cut_into_shards,
    run_shards,
    take_shards,
)
from srlm_mega.sampling.throughput import ShardWatch
from srlm_mega.seeds import derive_seed
from srlm_mega.stages.sampler_weights import open_model
from srlm_mega.work import Work

T = TypeVar("T")
Sampled = Candidate | Judgement | MetaJudgement


@dataclass(frozen=True)
class Request(Generic[T]):
    """One prompt of the sampler; `source` is what the records are about, `id` names the request where it fails."""

    id: str
    source: T
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class SamplingTask(Generic[T]):
    """What a stage samples: with which model, what, how (the seed is each shard's own), and what becomes of it."""

    model: str
    requests: Sequence[Request[T]]
    params: SamplingParams
    records: Callable[[Request[T], Sequence[Completion]], Iterator[Sampled]]
    file: str
    unit: str


def sample_in_shards(work: Work, task: SamplingTask[T]) -> None:
    """Write the task's file in the stage's output, the failed requests and metrics.jsonl beside it."""
    config, files = work.config, shard_files(work, task.requests, task.file)
    watch = ShardWatch(
        work.out / "metrics.jsonl",
        lambda done, total, note: work.progress.update(done, total, task.unit, note),
        len(task.requests),
        config.sampler.devices_per_replica,
        config.sampler_replicas,
    )
    if config.sampler_replicas > 1:
        run_replicas(files, partial(start_replica, work), config.sampler_replicas, watch)
    else:
        with closing(patient_sampler(work, task)) as sampler:
            run_shards(files, partial(answer, task, sampler), watch.earlier, watch.finished)
    watch.close()


def judgements_of(
    chat: Chat,
    model_hash: str,
    decoding: Decoding,
    letter: str,
    request: Request[T],
    completions: Sequence[Completion],
) -> Iterator[Judgement]:
    """The judgements of one response, which the request is named after."""
    for number, completion in enumerate(completions):
        text = chat.decode(completion.token_ids)
        yield Judgement(
            id=f"{request.id}-{letter}{number}",
            candidate_id=request.id,
            text=text,
            score=parse_score(text),
            finish_reason=completion.finish_reason,
            seed=completion.seed,
            model_hash=model_hash,
            token_ids=completion.token_ids,
            cumulative_logprob=completion.cumulative_logprob,
            decoding=decoding,
        )


def that_fit(work: Work, requests: Sequence[Request[T]], max_new_tokens: int) -> list[Request[T]]:
    """Requests that leave room for a whole answer: over-long ones are never sent and never cut."""
    longest = work.config.longest_prompt(max_new_tokens)
    return [request for request in requests if len(request.token_ids) <= longest]


def start_replica(work: Work, number: int) -> "subprocess.Popen[bytes]":
    """`srlm replica` in the sampler's environment; it ends with this process."""
    return subprocess.Popen(
        sampler_process(work.config, ["replica", str(work.run.root), work.stage.name, str(number)]),
        stdin=subprocess.DEVNULL,
        preexec_fn=partial(die_with, os.getpid()),
        env=dict(os.environ) | devices_of(number, work.config),
    )


def work_as_replica(work: Work, task: SamplingTask[T], number: int) -> int:
    """Take shards of a stage that another process began until all are there. Returns the exit code; a mistake or a
    stop leaves its message for that process."""
    die_with(os.getppid())
    show_stacks_when_asked()
    files = shard_files(work, task.requests, task.file)
    try:
        with closing(patient_sampler(work, task)) as sampler:
            seconds = work.config.runtime.sampler.take_over_seconds
            take_shards(files, partial(answer, task, sampler), number, seconds, nobody_watches)
    except (UserError, RunStopped) as error:
        Progress(replica_progress(files.folder, number)).failed(exit_code(error), str(error))
        return exit_code(error)
    return 0


def nobody_watches(report: ShardReport) -> None:
    """A replica's reports are read from their files."""


def shard_files(work: Work, requests: Sequence[T], file: str) -> ShardFiles[T]:
    """The stage's shards, the same in every process that works on them."""
    seed = derive_seed(work.config.run.seed, work.stage.name)
    shards = cut_into_shards(requests, work.config.sampler.shard_size, seed)
    return ShardFiles(shards, work.out / file, failures_allowed(work, requests))


def failures_allowed(work: Work, requests: Sequence[T]) -> int:
    """How many requests of a stage may fail for good."""
    return int(work.config.sampler.max_failed_share * len(requests))


def patient_sampler(work: Work, task: SamplingTask[T]) -> PatientSampler:
    """The task's model, loaded. It stops by itself when this process alone has too many failures."""
    return open_model(work, task.model, failures_allowed(work, task.requests))


def answer(task: SamplingTask[T], sampler: PatientSampler, shard: Shard[Request[T]]) -> Answered:
    """The records of one shard. All n completions of a prompt are one request."""
    requests = shard.requests
    params = replace(task.params, seed=shard.seed)
    answers = sampler.sample([one.id for one in requests], [one.token_ids for one in requests], params)
    records: list[Sampled] = []
    failed: list[FailedRequest] = []
    for request, completions in zip(requests, answers, strict=True):
        if isinstance(completions, FailedRequest):
            failed.append(completions)
        else:
            records += task.records(request, completions)
    prompt_tokens = sum(len(request.token_ids) for request in requests)
    return Answered(records, failed, prompt_tokens, sum(len(record.token_ids) for record in records))
