"""A configuration's training stages as jobs of the planner, and the seconds of their steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, exp
from statistics import NormalDist
from typing import assert_never

from srlm_mega.config import Config
from srlm_mega.config.model_sizes import flops_per_token
from srlm_mega.config.training import DpoConfig, Fp8Recipe, OptimizationConfig
from srlm_mega.gpus import GpuModel
from srlm_mega.tools.planner.job import Job, Layers, ParallelLayout, Stack
from srlm_mega.tools.planner.memory import MARGIN, StageMemory, stage_memory
from srlm_mega.tools.planner.step_time import FITTED, NAMES, Quantities, step_parts
from srlm_mega.training.packing import LENGTH_MULTIPLE, Pipelines, cut_into_packs, number_of_parts

OURS = Stack(
    "srlm_mega", overlaps_tensor_parallel=False, selective_attention=False
)  # the trainer does not set Megatron's tp_comm_overlap
# Of the logarithm of the tokens of a sequence and of a pair: 0.80 and 0.71 in 60 trees of OpenAssistant.
SEQUENCE_SPREAD, PAIR_SPREAD = 0.8, 0.7


@dataclass(frozen=True)
class Lengths:
    """Assumed mean tokens of the texts, before any exists."""

    prompt: int = 120
    response: int = 350
    judgement: int = 140
    judge_template: int = 420

    @property
    def sequence(self) -> int:
        """Tokens of prompt and response."""
        return self.prompt + self.response


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimiser step by their cause, and the step's tokens and MFU."""

    seconds: dict[str, float]
    tokens: float
    mfu: float  # of the causal model FLOP

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())

    @property
    def dominant(self) -> str:
        """The cause that takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def layout_of(config: Config) -> ParallelLayout:
    """Return the configured layout."""
    parallel = config.parallel
    return ParallelLayout(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
        config.world_size // parallel.model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size or 1,
        parallel.sequence_parallel,
        parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )


@dataclass(frozen=True)
class Cut:
    """A global batch as the trainer cuts it: micro batches of all replicas, each of so many rows of so many tokens."""

    micro_batches: int
    rows: int
    length: int


def sequences_of(section: OptimizationConfig) -> int:
    """Return the sequences of an item: two of a pair."""
    return 2 if isinstance(section, DpoConfig) else 1


@cache
def typical_lengths(mean: float, spread: float, number: int, longest: int) -> tuple[int, ...]:
    """Return the lengths of a typical batch: a lognormal distribution in `number` equal parts, none above `longest`."""
    drawn = [exp(spread * NormalDist().inv_cdf((place + 0.5) / number)) for place in range(number)]
    return tuple(min(longest, ceil(mean * number * each / sum(drawn))) for each in drawn)


def typical_cut(config: Config, section: OptimizationConfig, layout: ParallelLayout, lengths: Lengths) -> Cut:
    """Return how a typical global batch is cut."""
    each, batch, longest = sequences_of(section), section.global_batch_size, config.model.seq_length
    mean = min(lengths.sequence, longest)
    if section.packed_sequence_size is None:
        return cut(typical_lengths(mean, SEQUENCE_SPREAD, batch * each, longest), section, layout)
    spread = SEQUENCE_SPREAD if each == 1 else PAIR_SPREAD
    return cut(typical_lengths(each * mean, spread, batch, each * (longest - 1)), section, layout)


def cut(weights: Sequence[int], section: OptimizationConfig, layout: ParallelLayout) -> Cut:
    """Cut a global batch of items of these tokens or, where it is padded, of sequences of these."""
    pipelines, multiple = Pipelines(layout.dp, layout.pp, layout.vpp), LENGTH_MULTIPLE * layout.tp * layout.cp
    if section.packed_sequence_size is None:
        number = number_of_parts(section.global_batch_size, section.micro_batch_size, pipelines.multiple)
        rows, length = section.micro_batch_size * sequences_of(section), max(weights)
    else:
        packs = cut_into_packs(weights, section, pipelines)
        number, rows, length = len(packs), 1, sum(weights[place] for place in packs[0])
    return Cut(number, rows, -(-length // multiple) * multiple)


def training_job(
    config: Config, section: OptimizationConfig, layout: ParallelLayout, gpu: GpuModel, lengths: Lengths
) -> Job:
    """Return one optimiser step at assumed lengths: packed rows, or rows padded to the batch's longest sequence."""
    made = typical_cut(config, section, layout, lengths)
    rows, mean = made.micro_batches * made.rows, min(lengths.sequence, config.model.seq_length)
    filled = min(1.0, step_tokens(config, section, lengths) / (rows * made.length))
    return Job(
        config.model.sizes,
        gpu,
        layout,
        config.trainer.precision,
        made.rows,
        rows,
        made.length,
        config.trainer.recompute_granularity or "none",
        stack_of_trainer(config),
        current_scaling=scales_whole_tensors(config.trainer.fp8_recipe),
        attended_length=None if section.packed_sequence_size is None else mean,
        head_rows=lengths.response / lengths.sequence * filled,
        hidden_dropout=section.hidden_dropout > 0,
        eager=config.trainer.device == "cpu",
        fused_head=True,
    )


def scales_whole_tensors(recipe: Fp8Recipe) -> bool:
    """Tell whether a cast to FP8 reads the whole tensor for its scale first; a block's scale comes with the cast."""
    match recipe:
        case "tensorwise":
            return True
        case "delayed" | "blockwise" | "mxfp8":
            return False
        case _:
            assert_never(recipe)


def stack_of_trainer(config: Config) -> Stack:
    """Return the trainer as a framework. Its kernels are NVIDIA's with Transformer Engine's layers alone."""
    layers = layers_of_trainer(config)
    return replace(OURS, layers=layers, tuned=layers == "transformer_engine")


def layers_of_trainer(config: Config) -> Layers:
    """Return the layers to plan with. `auto` is Transformer Engine where it is installed: not known here, so it counts
    as torch, whose layers keep more."""
    engine = config.model.layer_backend == "transformer_engine" or config.trainer.fp8 is not None
    return "transformer_engine" if engine else "torch"


def planned_memory(config: Config, job: Job, margin: float = MARGIN) -> list[StageMemory]:
    """Return the memory of every pipeline stage in DPO or SFT, whichever needs more on the layout of `job`."""
    stages = [stage_memory(longest_job(config, section, job), margin) for section in (config.dpo, config.sft)]
    return [max(each, key=lambda stage: stage.total) for each in zip(*stages, strict=True)]


def longest_job(config: Config, section: OptimizationConfig, job: Job) -> Job:
    """Return a stage's step on the layout of `job` with sequences as long as they may get, trained on whole where they
    can be: then packs hold few items, and there are many micro batches to fill the pipeline with."""
    step = training_job(config, section, job.layout, job.gpu, Lengths())
    longest, each, capacity = config.model.seq_length, sequences_of(section), section.packed_sequence_size
    trained = 1.0
    if capacity is None:
        rows, length = step.global_batch, longest
        if isinstance(section, DpoConfig):  # sampled responses are cut, those of the seed data are not
            trained = min(1.0, config.candidates.max_new_tokens / longest)
    else:
        made = cut([each * (longest - 1)] * section.global_batch_size, section, job.layout)
        # Of these the fewest packs may not be full, of others they may.
        rows, length = made.micro_batches, made.length if section.packs == "auto" else capacity
    return replace(step, global_batch=rows, seq_length=length, recompute=job.recompute, head_rows=trained)


def measure(job: Job, tokens: float, factors: Quantities = FITTED) -> StepTime:
    """Plan the seconds of a step of which `tokens` are no padding."""
    parts = step_parts(job)
    busy = parts.once.plus(parts.micro_batch, parts.micro_batches).times(factors)
    by_name = dict(zip(NAMES, busy.values, strict=True))
    seconds = {words: sum(by_name[name] for name in names) for words, names in TERMS.items()}
    seconds["pipeline bubble"] = sum(parts.bubble.times(factors).values)
    per_token = flops_per_token(job.shape, job.attended_length or job.seq_length)
    peak = job.gpu.flops_per_second(job.precision) * job.layout.gpus
    return StepTime(seconds, tokens, per_token * tokens / sum(seconds.values()) / peak)


TERMS = {
    "bf16 products": ("matrices_bf16",),
    "FP8 products": ("matrices_fp8",),
    "operands": ("matrix_bytes",),
    "attention": ("attention", "attention_flash2", "attention_ring"),
    "memory-bound passes": ("passes",),
    "slower kernels": ("untuned",),
    "kernel launches": ("launches",),
    "TP messages": ("tensor_parallel", "tensor_parallel_serial"),
    "CP messages": ("context_parallel",),
    "PP messages": ("pipeline",),
    "DP messages": ("data_parallel", "hops"),
}


def step_tokens(config: Config, section: OptimizationConfig, lengths: Lengths) -> float:
    """Return the tokens of a global batch, padding left out."""
    return section.global_batch_size * sequences_of(section) * min(lengths.sequence, config.model.seq_length)


def steps_of(section: OptimizationConfig, items: int) -> int:
    """Return the optimiser steps of a stage that trains on so many items."""
    if section.train_iters is not None:
        return section.train_iters
    return (section.epochs or 1) * max(1, items // section.global_batch_size)
