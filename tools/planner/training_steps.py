"""A configuration's training stages as jobs of the planner, and the seconds of their steps."""

from dataclasses import dataclass, replace
from typing import assert_never

from srlm_mega.config import Config
from srlm_mega.config.model_sizes import flops_per_token
from srlm_mega.config.training import DpoConfig, Fp8Recipe, OptimizationConfig
from srlm_mega.gpus import GpuModel
from srlm_mega.tools.planner.job import Job, Layers, ParallelLayout, Stack
from srlm_mega.tools.planner.memory import MARGIN, StageMemory, stage_memory
from srlm_mega.tools.planner.step_time import FITTED, NAMES, Quantities, step_parts

OURS = Stack(
    "srlm_mega", overlaps_tensor_parallel=False, selective_attention=False
)  # the trainer does not set Megatron's tp_comm_overlap
LONGEST_OVER_MEAN = 2.0  # assumed: padded rows are as long as the longest sequence of the global batch


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


def training_job(
    config: Config, section: OptimizationConfig, layout: ParallelLayout, gpu: GpuModel, lengths: Lengths
) -> Job:
    """Return one optimiser step at assumed lengths: packed rows, or rows padded to the batch's longest sequence."""
    packed, sequences = section.packed_sequence_size, 2 if isinstance(section, DpoConfig) else 1
    mean = min(lengths.sequence, config.model.seq_length)
    if packed is not None:
        length, micro_batch, filled = packed, 1, 1.0
        rows = step_tokens(config, section, lengths) / length
    else:
        length = min(int(mean * LONGEST_OVER_MEAN), config.model.seq_length)
        micro_batch, filled = section.micro_batch_size * sequences, mean / length
        rows = float(section.global_batch_size * sequences)
    return Job(
        config.model.sizes,
        gpu,
        layout,
        config.trainer.precision,
        micro_batch,
        whole_micro_batches(rows, micro_batch, layout),
        length,
        config.trainer.recompute_granularity or "none",
        stack_of_trainer(config),
        current_scaling=scales_whole_tensors(config.trainer.fp8_recipe),
        attended_length=None if packed is None else mean,
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


def whole_micro_batches(rows: float, micro_batch: int, layout: ParallelLayout) -> int:
    """Return the rows of a step in which all replicas have as many micro batches: empty rows take as long."""
    each = max(1, -int(-rows // (micro_batch * layout.dp)))
    return each * micro_batch * layout.dp


def planned_memory(config: Config, job: Job, margin: float = MARGIN) -> list[StageMemory]:
    """Return the memory of every pipeline stage in DPO or SFT, whichever needs more on the layout of `job`."""
    stages = [stage_memory(longest_job(config, section, job), margin) for section in (config.dpo, config.sft)]
    return [max(each, key=lambda stage: stage.total) for each in zip(*stages, strict=True)]


def longest_job(config: Config, section: OptimizationConfig, job: Job) -> Job:
    """Return a stage's step on the layout of `job` with sequences as long as they may get, trained on whole where they
    can be: then packs hold few items, and there are many micro batches to fill the pipeline with."""
    step, packed = training_job(config, section, job.layout, job.gpu, Lengths()), section.packed_sequence_size
    sequences = 2 if isinstance(section, DpoConfig) else 1
    trained = 1.0
    if packed is None:
        longest = replace(step, seq_length=config.model.seq_length)
        if isinstance(section, DpoConfig):  # sampled responses are cut, those of the seed data are not
            trained = min(1.0, config.candidates.max_new_tokens / config.model.seq_length)
    else:
        items = max(1, packed // (sequences * config.model.seq_length))  # in a pack
        rows = section.global_batch_size / items
        longest = replace(step, global_batch=whole_micro_batches(rows, step.micro_batch, job.layout))
    return replace(longest, recompute=job.recompute, head_rows=trained)


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
    sequences = 2 if isinstance(section, DpoConfig) else 1
    return section.global_batch_size * sequences * min(lengths.sequence, config.model.seq_length)


def steps_of(section: OptimizationConfig, items: int) -> int:
    """Return the optimiser steps of a stage that trains on so many items."""
    if section.train_iters is not None:
        return section.train_iters
    return (section.epochs or 1) * max(1, items // section.global_batch_size)
