"""Files by which the process that runs a stage tells its replicas what to do: the model to load, and then one job after
the other, each a list of requests in shards. Answers come back as the shards' files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from srlm_mega.chat import StopStrings
from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.records import PromptTokens, parse_line, read_jsonl, write_jsonl
from srlm_mega.run.files import write_atomic
from srlm_mega.sampling.sampler import SamplingParams
from srlm_mega.sampling.shards import Shard, ShardFiles

JOB, REQUESTS, MODEL, CURRENT = "job.json", "requests.jsonl", "model.json", "current.json"


@dataclass(frozen=True)
class SampledModel:
    """A model to sample: the Hugging Face folder whose tokenizer and chat template it has, and the folder that the
    sampler loads, which is another one for FP8 weights and engines. `name`: the hash of its content, where that may
    change while requests are answered."""

    weights: Path
    loaded: Path
    name: str = ""


@dataclass(frozen=True)
class ReplicaSettings:
    """What a replica reads before it loads its model."""

    model: SampledModel
    sampler: SamplerConfig

    def save(self, folder: Path) -> None:
        """Write the settings for the replicas of a folder."""
        fields = {"model": self.model, "sampler": self.sampler.model_dump(mode="json")}
        write_atomic(folder / MODEL, orjson.dumps(fields, default=str))

    @classmethod
    def load(cls, folder: Path) -> "ReplicaSettings":
        """Read what `save` wrote."""
        return parse_line(cls, (folder / MODEL).read_bytes())


@dataclass(frozen=True)
class CurrentJob:
    """The job that replicas work on: its number, from 0, and the folder of its shards."""

    number: int
    shards: Path

    def save(self, folder: Path) -> None:
        """Hand the job to the replicas of a folder."""
        write_atomic(folder / CURRENT, orjson.dumps(self, default=str))

    @classmethod
    def load(cls, folder: Path) -> "CurrentJob | None":
        """Read the current job; None before the first one."""
        path = folder / CURRENT
        return parse_line(cls, path.read_bytes()) if path.is_file() else None


@dataclass(frozen=True)
class ShardSlice:
    """A shard without its requests, of which there are `size`."""

    number: int
    first: int
    seed: int
    position: int
    model: str
    size: int


@dataclass(frozen=True)
class JobFile:
    """A list of requests in shards, and their decoding. `stop`: stop strings."""

    output: Path
    allowed: int | None
    n: int
    temperature: float
    top_p: float
    max_new_tokens: int
    logprobs: bool
    stop: tuple[str, ...]
    shards: tuple[ShardSlice, ...]


def write_job(files: ShardFiles[PromptTokens], params: SamplingParams) -> None:
    """Write a job into the folder of its shards."""
    job = JobFile(
        output=files.output,
        allowed=files.allowed,
        n=params.n,
        temperature=params.temperature,
        top_p=params.top_p,
        max_new_tokens=params.max_new_tokens,
        logprobs=params.logprobs,
        stop=() if params.stop is None else params.stop.strings,
        shards=tuple(
            ShardSlice(one.number, one.first, one.seed, one.position, one.model, len(one.requests))
            for one in files.shards
        ),
    )
    write_jsonl(files.folder / REQUESTS, (request for shard in files.shards for request in shard.requests))
    write_atomic(files.folder / JOB, orjson.dumps(job, default=str))


def read_job(
    folder: Path, stop: Callable[[Sequence[str]], StopStrings | None]
) -> tuple[ShardFiles[PromptTokens], SamplingParams]:
    """Read what `write_job` wrote. `stop`: function that makes stop strings with the model's tokenizer."""
    job = parse_line(JobFile, (folder / JOB).read_bytes())
    requests = list(read_jsonl(folder / REQUESTS, PromptTokens))
    shards = [
        Shard(one.number, one.first, one.seed, requests[one.first : one.first + one.size], one.position, one.model)
        for one in job.shards
    ]
    params = SamplingParams(
        job.n, job.temperature, job.top_p, job.max_new_tokens, seed=0, stop=stop(job.stop), logprobs=job.logprobs
    )
    return ShardFiles(shards, job.output, job.allowed), params
