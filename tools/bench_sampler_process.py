"""A sampler in an environment of its own, for `srlm bench sampling`: a process that loads a model, and answers a line
of requests on stdin with a line of figures on stdout."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import orjson

from srlm_mega.config.runtime import SamplerConfig
from srlm_mega.errors import UserError
from srlm_mega.launch.child_process import die_with
from srlm_mega.sampling.backends import open_sampler
from srlm_mega.sampling.sampler import Sampler, SamplingParams

Prompts = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Figures:
    """A method's run over some requests. Of an engine that counts them also: its steps, the completions that these had
    at work (summed), the tokens of all copies' prompts, and those of them that it had computed before."""

    output_tokens: int
    steps: int = 0
    at_work: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Method(Protocol):
    """A way to answer requests."""

    def __call__(self, prompts: Prompts, params: SamplingParams) -> Figures:
        """Sample, and return what was counted."""


def sample_with(sampler: Sampler, prompts: Prompts, params: SamplingParams) -> Figures:
    """Sample with any backend."""
    return Figures(sum(len(one.token_ids) for group in sampler.sample(prompts, params) for one in group))


@contextmanager
def sampler_process(
    python: Path, config: SamplerConfig, folder: Path, end_ids: tuple[int, ...], threads: int
) -> Iterator[Method]:
    """Load a model with the configured backend in another environment. UserError when that fails."""
    settings = {"config": config.model_dump(mode="json"), "folder": str(folder.absolute()), "end_ids": end_ids}
    process = subprocess.Popen(
        [str(python.absolute()), "-m", "srlm_mega.tools.bench_sampler_process", orjson.dumps(settings).decode()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        preexec_fn=partial(die_with, os.getpid()),
    )

    def ask(prompts: Prompts, params: SamplingParams) -> Figures:
        assert process.stdin is not None and process.stdout is not None
        assert params.stop is None, "stop strings are not sent"
        process.stdin.write(orjson.dumps({"prompts": prompts, "params": asdict(params)}) + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise UserError(f"{python}: sampler.backend={config.backend} ended; what it wrote stands above")
        return Figures(**orjson.loads(answer))

    try:
        yield ask
    finally:
        process.kill()
        process.wait()


def answer_lines(config: SamplerConfig, folder: Path, end_ids: tuple[int, ...]) -> None:
    """Be that process. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    sampler = open_sampler(config, folder, end_ids)
    before: Mapping[str, int] = counts_of(config, sampler)
    for line in sys.stdin.buffer:
        asked = orjson.loads(line)
        figures = sample_with(sampler, [tuple(one) for one in asked["prompts"]], SamplingParams(**asked["params"]))
        counts = counts_of(config, sampler)
        new = {name: count - before[name] for name, count in counts.items()}
        answers.write(orjson.dumps({"output_tokens": figures.output_tokens, **new}) + b"\n")
        before = counts


def counts_of(config: SamplerConfig, sampler: Sampler) -> dict[str, int]:
    """Return what an engine has counted so far."""
    if config.backend != "vllm":
        return {}
    from srlm_mega.sampling.vllm_sampler import VllmSampler

    assert isinstance(sampler, VllmSampler), sampler
    return asdict(sampler.counts)


if __name__ == "__main__":
    given = orjson.loads(sys.argv[1])
    answer_lines(SamplerConfig.model_validate(given["config"]), Path(given["folder"]), tuple(given["end_ids"]))
