"""python tools/scripts/bench_schedule.py: how full replicas keep their engines, in virtual time on modelled engines.

The candidates and judgements of a round go through the code that replicas run, files of shards included; only engines
and clock are modelled. The measure is a replica that has its whole share of the requests in one queue.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Annotated, get_args

import typer

from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.gpus import find_gpu
from srlm_mega.records import PromptTokens, SampledText
from srlm_mega.run.stage_kinds import Estimate
from srlm_mega.sampling.in_flight import ShardsInFlight, Taker
from srlm_mega.sampling.sampler import Completion, Request, SamplingParams
from srlm_mega.sampling.sampling_rate import Unwatched
from srlm_mega.sampling.shards import WAIT_SECONDS, Answered, ShardFiles, cut_into_shards
from srlm_mega.tools.bench_record import markdown
from srlm_mega.tools.planner.engine_model import MODELLED, EngineModel, SchedulerPolicy, share_seconds
from srlm_mega.tools.planner.generation import Replica
from srlm_mega.tools.planner.training_steps import Lengths, layout_of
from srlm_mega.tools.planner.whole_run import Cluster, Requests, replica_of, requests_of
from srlm_mega.tools.virtual_engines import ModelledSampler, VirtualClock

LENGTHS = Lengths(response=450)  # judgements of 140 tokens: the template asks for at most 100 words and the score
HEADER = (
    "scheduler",
    "requests",
    "candidates",
    "judgements",
    "with loading",
    "tokens/s",
    "of one queue",
    "without loading",
)
STAGES = (Estimate.CANDIDATES, Estimate.JUDGEMENTS)


@dataclass(frozen=True)
class Schedule:
    """A way in which replicas work on shards: on all that their engines have room for, or (`barrier`) on one at a time;
    with one load for all stages, or one each."""

    shard_size: int
    barrier: bool = False
    loads: int = 1


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of the stages without loading, and the tokens that were sampled in them."""

    seconds: tuple[float, ...]
    tokens: float
    loads: int = 1

    def speed(self, load_seconds: float) -> float:
        """Return the tokens/s of all replicas, their loading included."""
        return self.tokens / (sum(self.seconds) + self.loads * load_seconds)


@dataclass(frozen=True)
class Fleet:
    """Replicas that sample the stages of a round one after the other."""

    replica: Replica
    replicas: int
    policy: SchedulerPolicy
    load_seconds: float
    stages: tuple[Requests, ...]

    def one_queue(self) -> StageSeconds:
        """Measure replicas that have their share of each stage in one queue, and work until its last straggler ends."""
        seconds = tuple(self._queue(stage, self._share(stage)) for stage in self.stages)
        return StageSeconds(seconds, self._tokens)

    def endless_queue(self) -> StageSeconds:
        """Measure the same work as a part of a queue that never ends: there are no stragglers."""
        seconds = []
        for stage in self.stages:
            half = MODELLED // 2 // stage.samples
            pace = (self._queue(stage, 2 * half) - self._queue(stage, half)) / half
            seconds.append(pace * self._share(stage))
        return StageSeconds(tuple(seconds), self._tokens)

    def run(self, schedule: Schedule) -> StageSeconds:
        """Measure the replicas' own code."""
        clock, seconds, tokens = VirtualClock(), list[float](), 0
        samplers: list[ModelledSampler] = []
        for number, stage in enumerate(self.stages):
            if number < schedule.loads:
                clock.now += self.load_seconds
                samplers = [self._sampler(clock) for _ in range(self.replicas)]
            begin, before = clock.now, sum(sampler.engine.sampled for sampler in samplers)
            with tempfile.TemporaryDirectory() as folder:
                answer(stage, schedule, samplers, clock, Path(folder) / "records.jsonl")
            seconds.append(clock.now - begin)
            tokens += sum(sampler.engine.sampled for sampler in samplers) - before
        return StageSeconds(tuple(seconds), tokens, schedule.loads)

    @property
    def _tokens(self) -> float:
        return sum(stage.count * stage.samples * stage.output for stage in self.stages)

    def _share(self, stage: Requests) -> int:
        return ceil(stage.count / self.replicas)

    def _queue(self, stage: Requests, count: int) -> float:
        return share_seconds(self.replica, self.policy, count, stage.prompt, stage.samples, stage.lengths)

    def _sampler(self, clock: VirtualClock) -> ModelledSampler:
        lengths = {stage.cap: stage.lengths for stage in self.stages}
        return ModelledSampler(EngineModel(self.replica, self.policy, clock.now), clock, lengths)


def answer(
    stage: Requests, schedule: Schedule, samplers: Sequence[ModelledSampler], clock: VirtualClock, output: Path
) -> None:
    """Let the replicas answer a stage's requests, by files next to `output`."""
    prompt = (0,) * stage.prompt
    requests = [PromptTokens(str(number), prompt) for number in range(int(stage.count))]
    files = ShardFiles(cut_into_shards(requests, schedule.shard_size, 0, stage.cap), output)
    files.prepare()
    params = SamplingParams(n=stage.samples, temperature=0.7, top_p=0.9, max_new_tokens=stage.cap, seed=0)
    work = one_shard_at_a_time if schedule.barrier else shards_in_flight
    takers = [Taker(number, mixes_shards=True, replicas=lambda: len(samplers)) for number in range(len(samplers))]
    clock.run([partial(work, files, params, *each, clock) for each in zip(samplers, takers, strict=True)])
    assert not files.missing(), "all is answered"


def shards_in_flight(
    files: ShardFiles[PromptTokens], params: SamplingParams, sampler: ModelledSampler, taker: Taker, clock: VirtualClock
) -> None:
    """Work as a replica."""
    ShardsInFlight(files, params, sampler, as_text, taker, Unwatched(), lambda: clock.now, clock.sleep).run()


def one_shard_at_a_time(
    files: ShardFiles[PromptTokens], params: SamplingParams, sampler: ModelledSampler, taker: Taker, clock: VirtualClock
) -> None:
    """Work as replicas did up to version 0.2: a shard's answers are awaited before the next one is taken."""
    while files.missing():
        shard = files.lease_next(taker.replica, taker.take_over_seconds)
        if shard is None:
            clock.sleep(WAIT_SECONDS)
            continue
        seeded = replace(params, seed=shard.seed)
        for _ in sampler.stream(Request(one.token_ids, seeded, place) for place, one in enumerate(shard.requests)):
            pass
        files.finish(shard, Answered([]), Answered([]).report(shard, taker.replica, 0.0, 0.0))


def as_text(completion: Completion) -> SampledText:
    """Return a completion's record, without the tokens that it does not have."""
    return SampledText("", (), completion.finish_reason, completion.seed)


def fleet_of(config: Config, gpu: str, policy: SchedulerPolicy, load_seconds: float, prompts: int) -> Fleet:
    """Return a configured sampler's replicas, and the candidates and judgements of a round of so many prompts."""
    cluster = Cluster(find_gpu(gpu), layout_of(config), config.sampler.num_devices)
    each = replica_of(config, cluster)
    stages = [requests_of(estimate, config, LENGTHS)[0] for estimate in STAGES]
    factor = prompts / config.prompts.per_round
    scaled = tuple(replace(stage, count=stage.count * factor) for stage in stages)
    return Fleet(each, cluster.sampler_gpus // each.gpus, policy, load_seconds, scaled)


def main(
    config: Annotated[Path, typer.Option(help="The run whose sampler and round are modelled.")] = Path(
        "launch/configs/llama2_70b_64gpu.yaml"
    ),
    gpu: Annotated[str, typer.Option(help="The GPU, by a name that srlm plan knows.")] = "h100",
    load_seconds: Annotated[float, typer.Option(min=0, help="Seconds until a replica has loaded.")] = 240.0,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of the round.")] = 5000,
    shard_size: Annotated[list[int] | None, typer.Option(help="Requests per shard; may be repeated.")] = None,
) -> None:
    """Print how long the candidates and judgements of a round take, by shard size and by the engine's scheduler."""
    loaded, sizes = load_config(config), shard_size or [16, 32, 64, 256]
    schedules = {"one shard of 256 at a time, a load per stage": Schedule(256, barrier=True, loads=2)}
    schedules |= {f"shards of {size} in flight": Schedule(size) for size in sizes}
    rows = [list(HEADER)]
    for policy in get_args(SchedulerPolicy):
        fleet = fleet_of(loaded, gpu, policy, load_seconds, prompts)
        best = fleet.one_queue()
        rows.append(row(policy, "a queue that never ends", fleet.endless_queue(), best, load_seconds))
        rows.append(row(policy, "one queue per replica", best, best, load_seconds))
        for name, schedule in schedules.items():
            rows.append(row(policy, name, fleet.run(schedule), best, load_seconds))
    print(markdown(rows))


def row(policy: str, name: str, measured: StageSeconds, best: StageSeconds, load_seconds: float) -> list[str]:
    """Return a line of the table: seconds, tokens/s of all replicas, and that as a share of the best."""
    speed, total = measured.speed(load_seconds), measured.tokens / measured.speed(load_seconds)
    shares = [speed / best.speed(load_seconds), measured.speed(0.0) / best.speed(0.0)]
    times = [f"{seconds:.0f} s" for seconds in (*measured.seconds, total)]
    return [policy, name, *times, f"{speed:,.0f}", *(f"{share:.1%}" for share in shares)]


if __name__ == "__main__":
    typer.run(main)
