"""Requests and seconds of every stage of a run, by the plan that `srlm run` follows."""

from dataclasses import dataclass, replace
from functools import cache
from math import ceil

from srlm_mega.config import Config
from srlm_mega.config.training import OptimizationConfig
from srlm_mega.gpus import GpuModel
from srlm_mega.run.plan import Stage, plan
from srlm_mega.run.stage_kinds import Estimate
from srlm_mega.tools.planner.engine_model import OutputLengths, SchedulerPolicy, share_seconds
from srlm_mega.tools.planner.generation import Replica
from srlm_mega.tools.planner.job import ParallelLayout
from srlm_mega.tools.planner.sampler_memory import require_calibration_fits, require_replica_fits
from srlm_mega.tools.planner.training_steps import Lengths, measure, step_tokens, steps_of, training_job

# Guesses, none of them measured by this project on a GPU.
DISK_BYTES_PER_SECOND = 2e9  # checkpoints, read or written
START_SECONDS = 90.0  # of a stage: Python, NCCL, CUDA
CPU_STAGE_SECONDS = 10.0
ENGINE_SECONDS, ENGINE_SECONDS_PER_BYTE = 60.0, 6e-9  # trtllm-build, and per byte of weights on a GPU
PAIR_SHARE = 0.9  # of prompts that give a pair
POSITIVE_SHARE = 0.2  # of candidates that have a perfect score
PROMPTS_PER_REQUEST = 4  # new instructions that pass the filters, of a Self-Instruct request
REPLIES_PER_SOURCE = 4  # ranked replies that EFT is built from
LENGTH_SPREAD = 0.8  # of the logarithm of outputs' lengths
FORWARD_SHARE = 1 / 2  # of a step with frozen weights, which is forward and one of two backward products


@dataclass(frozen=True)
class StageTime:
    """The time of one stage; `gpus` are at work, and the allocation pays for all."""

    name: str
    estimate: Estimate
    what: str
    gpus: int
    seconds: float
    tokens_per_second: float | None = None  # sampled by a GPU at work

    @property
    def hours(self) -> float:
        """Hours of wall clock."""
        return self.seconds / 3600


@dataclass(frozen=True)
class Cluster:
    """The GPUs that a run is planned for, and their layout."""

    gpu: GpuModel
    layout: ParallelLayout
    sampler_gpus: int

    @property
    def gpus(self) -> int:
        """GPUs that the allocation holds from start to end."""
        return max(self.layout.gpus, self.sampler_gpus)


@dataclass(frozen=True)
class Requests:
    """`count` prompts of `prompt` tokens; each is answered `samples` times with a mean of `output` tokens, `cap` at
    most."""

    count: float
    prompt: int
    samples: int
    output: int
    cap: int

    @property
    def lengths(self) -> OutputLengths:
        """Distribution of the outputs' lengths."""
        return OutputLengths(self.output, self.cap, LENGTH_SPREAD)


def run_times(config: Config, cluster: Cluster, lengths: Lengths) -> list[StageTime]:
    """Plan all stages in order; training has a second line, for writing the Hugging Face folder. A model is loaded once
    for the stages that sample it one after the other."""
    times, loaded = list[StageTime](), set[str]()
    for stage in plan(config):
        models = {name for name in stage.inputs if name != "seed" and "/" not in name}
        times += stage_times(stage, config, cluster, lengths, loaded=stage.kind.samples and bool(models & loaded))
        if stage.kind.estimate is not Estimate.NO_GPU:
            loaded = models if stage.kind.samples else set()
    return times


def stage_times(
    stage: Stage, config: Config, cluster: Cluster, lengths: Lengths, loaded: bool = False
) -> list[StageTime]:
    """Plan the lines of one stage. `loaded`: the replicas have the model that it samples."""
    match stage.kind.estimate:
        case Estimate.NO_GPU:
            return [StageTime(stage.name, Estimate.NO_GPU, "no GPU", 0, CPU_STAGE_SECONDS)]
        case Estimate.FORWARD_PASS:
            return [reference_time(stage.name, config, cluster, lengths)]
        case Estimate.CONVERSION:
            return [conversion_time(stage.name, config, cluster, lengths)]
        case Estimate.PRETRAINING | Estimate.SFT_ON_IFT | Estimate.SFT | Estimate.SFT_ON_POSITIVES | Estimate.DPO:
            return training_times(stage, config, cluster, lengths)
        case Estimate.PROMPTS | Estimate.CANDIDATES | Estimate.JUDGEMENTS | Estimate.META_JUDGEMENTS:
            return [sampling_time(stage, config, cluster, lengths, loaded)]
        case Estimate.EFT | Estimate.EVALUATION:
            return [sampling_time(stage, config, cluster, lengths, loaded)]


def training_times(stage: Stage, config: Config, cluster: Cluster, lengths: Lengths) -> list[StageTime]:
    """Plan the training of a model: its optimiser steps, and its folder, written and read back."""
    what, section, items = training_of(stage.kind.estimate, config)
    gpus, weights = cluster.layout.gpus, 2 * config.model.sizes.parameters / DISK_BYTES_PER_SECOND
    job = training_job(config, section, cluster.layout, cluster.gpu, lengths)
    step = measure(job, step_tokens(config, section, lengths)).total
    seconds = steps_of(section, items) * step + START_SECONDS + weights
    return [
        StageTime(stage.name, stage.kind.estimate, what, gpus, seconds),
        StageTime(stage.name, Estimate.CONVERSION, "conversion", gpus, 2 * weights),
    ]


def training_of(estimate: Estimate, config: Config) -> tuple[str, OptimizationConfig, int]:
    """Return a training's name in words, its section, and the number of its items."""
    data = config.seed_data
    seed_items = data.num_ift + (data.num_eft if config.eft.enabled else 0)
    match estimate:
        case Estimate.PRETRAINING:
            assert config.pretrain is not None, "only a pre-trained M0 is trained"
            return "pre-training", config.pretrain, data.num_documents
        case Estimate.SFT_ON_IFT:
            return "SFT on IFT", config.sft, data.num_ift
        case Estimate.SFT:
            return "SFT", config.sft, seed_items
        case Estimate.SFT_ON_POSITIVES:
            positives = int(config.prompts.per_round * config.candidates.n * POSITIVE_SHARE)
            return "SFT on positives", config.sft, seed_items + min(positives, config.round.max_positives or positives)
        case Estimate.DPO:
            return "DPO", config.dpo, num_pairs(config)
        case other:
            raise AssertionError(f"{other} trains no model")


def num_pairs(config: Config) -> int:
    """Return the assumed pairs of a round."""
    return int(config.prompts.per_round * PAIR_SHARE)


def reference_time(name: str, config: Config, cluster: Cluster, lengths: Lengths) -> StageTime:
    """Plan one forward pass over the pairs."""
    job = training_job(config, config.dpo, cluster.layout, cluster.gpu, lengths)
    step = measure(replace(job, recompute="none", frozen=True), step_tokens(config, config.dpo, lengths)).total
    batches = num_pairs(config) / config.dpo.global_batch_size
    seconds = batches * step * FORWARD_SHARE + START_SECONDS
    return StageTime(name, Estimate.FORWARD_PASS, "forward pass", cluster.layout.gpus, seconds)


def conversion_time(name: str, config: Config, cluster: Cluster, lengths: Lengths) -> StageTime:
    """Plan the sampler's weights: read, written and verified. FP8 reads them twice before, for a calibration on one GPU
    and for the weights' own ranges; an engine is built on top."""
    each, what = replica_of(config, cluster), "conversion"
    weights = 2 * config.model.sizes.parameters
    moved = 2 * weights + 2 * each.weight_bytes
    seconds = START_SECONDS
    if each.fp8:
        what, moved = "calibration, conversion", moved + 2 * weights
        one = replace(each, gpus=1, fp8=False)
        seconds += config.sampler.calibration_size * one.prefill_seconds(lengths.sequence)
    if config.sampler.traits.loads_engine:
        what += ", engine build"
        seconds += ENGINE_SECONDS + ENGINE_SECONDS_PER_BYTE * each.weight_bytes / each.gpus
    return StageTime(name, Estimate.CONVERSION, what, each.gpus, moved / DISK_BYTES_PER_SECOND + seconds)


def sampling_time(stage: Stage, config: Config, cluster: Cluster, lengths: Lengths, loaded: bool) -> StageTime:
    """Plan a stage that samples, on all replicas, which have loaded the model (`loaded`) or load it first."""
    requests = requests_of(stage.kind.estimate, config, lengths)
    if not requests:
        return StageTime(stage.name, stage.kind.estimate, "no model", 0, CPU_STAGE_SECONDS)
    each = replica_of(config, cluster)
    replicas = max(1, cluster.sampler_gpus // each.gpus)
    busy = sum(busy_seconds(group, each, config.sampler.scheduler_policy, replicas) for group in requests)
    load = 0.0 if loaded else START_SECONDS + each.weight_bytes / DISK_BYTES_PER_SECOND
    gpus = replicas * each.gpus
    speed = sum(group.count * group.samples * group.output for group in requests) / busy / gpus
    return StageTime(stage.name, stage.kind.estimate, f"{replicas} x {each.gpus} GPUs", gpus, busy + load, speed)


@cache
def busy_seconds(requests: Requests, each: Replica, policy: SchedulerPolicy, replicas: int) -> float:
    """Return the seconds in which all replicas answer the requests, stragglers included: each has an even share."""
    count = ceil(requests.count / replicas)
    return share_seconds(each, policy, count, requests.prompt, requests.samples, requests.lengths)


def requests_of(estimate: Estimate, config: Config, lengths: Lengths) -> list[Requests]:
    """Return the requests of a kind of stage to a model; empty where it samples nothing."""
    prompts, judged = config.prompts.per_round, lengths.judge_template + lengths.sequence
    answer_cap, judge_cap = config.candidates.max_new_tokens, config.judge.max_new_tokens
    response, judgement = min(lengths.response, answer_cap), min(lengths.judgement, judge_cap)
    answers = Requests(prompts, lengths.prompt, config.candidates.n, response, answer_cap)
    judgements = Requests(prompts * config.candidates.n, judged, config.judge.n, judgement, judge_cap)
    match estimate:
        case Estimate.PROMPTS:
            return new_prompts(config, lengths)
        case Estimate.CANDIDATES:
            return [answers]
        case Estimate.JUDGEMENTS:
            return [] if config.judge.backend == "random" else [judgements]
        case Estimate.META_JUDGEMENTS:  # two judgements of a response side by side, in both orders
            compared = prompts * config.judge.n * (config.judge.n - 1)
            return [Requests(compared, judged + 2 * judgement, 1, judgement, judge_cap)]
        case Estimate.EFT:
            replies = config.seed_data.num_eft_sources * REPLIES_PER_SOURCE
            return [Requests(replies, judged, config.eft.attempts, judgement, judge_cap)]
        case Estimate.EVALUATION:
            held_out = config.seed_data.num_test or config.seed_data.num_validation
            samples = config.judge.n * config.evaluation.judge_replicates
            return [
                Requests(held_out, lengths.prompt, 2, response, answer_cap),
                Requests(config.seed_data.num_eft_eval, judged, samples, judgement, judge_cap),
            ]
        case Estimate.NO_GPU | Estimate.FORWARD_PASS | Estimate.CONVERSION:
            return []
        case Estimate.PRETRAINING | Estimate.SFT_ON_IFT | Estimate.SFT | Estimate.SFT_ON_POSITIVES | Estimate.DPO:
            return []


def new_prompts(config: Config, lengths: Lengths) -> list[Requests]:
    """Return Self-Instruct's requests: shots in, several new instructions out, which alone are a third of a prompt."""
    if config.prompts.generator == "file":
        return []
    shots = (config.prompts.shots_ift + config.prompts.shots_generated) * lengths.prompt // 3
    count, cap = config.prompts.per_round / PROMPTS_PER_REQUEST, config.prompts.max_new_tokens
    return [Requests(count, shots, 1, min(PROMPTS_PER_REQUEST * lengths.prompt, cap), cap)]


def replica_of(config: Config, cluster: Cluster) -> Replica:
    """Return one of the sampler's replicas. UserError for FP8 on a GPU without it, and where the model does not fit."""
    sampler = config.sampler
    if sampler.quantization == "fp8":
        cluster.gpu.require_fp8()
        require_calibration_fits(config, cluster.gpu)
    replica = Replica(
        config.model.sizes,
        cluster.gpu,
        sampler.devices_per_replica,
        sampler.quantization == "fp8",
        sampler.has_fp8_cache,
        sampler.batch_size,
        sampler.kv_cache_fraction,
    )
    require_replica_fits(replica, config.model.seq_length)
    return replica
