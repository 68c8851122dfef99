"""All layouts of a number of GPUs that fit, or tightly, fastest first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from srlm_mega.config import Config
from srlm_mega.config.model_sizes import GIB, ModelSizes
from srlm_mega.gpus import GpuModel
from srlm_mega.tools.planner.job import Job, ParallelLayout, Recompute
from srlm_mega.tools.planner.memory import MARGIN, Fit, fit
from srlm_mega.tools.planner.training_steps import Lengths, StepTime, measure, planned_memory, step_tokens, training_job

COUNTS = (64, 128, 256, 512, 1024)
LARGEST_PP, LARGEST_CP, MOST_CHUNKS = 16, 8, 5
RECOMPUTE: tuple[Recompute, ...] = ("none", "full")  # selective repeats nothing that flash attention keeps


@dataclass(frozen=True)
class Found:
    """A layout that fits, or tightly, with a DPO step on it."""

    gpus: int
    layout: ParallelLayout
    recompute: Recompute
    memory_gib: float  # of the fullest stage, margin included
    fits: Fit
    step: StepTime

    @property
    def gpu_seconds(self) -> float:
        """GPU-seconds of a step, which is what it costs."""
        return self.step.total * self.gpus


def search(
    config: Config, gpu: GpuModel, lengths: Lengths, counts: Sequence[int], margin: float = MARGIN
) -> list[Found]:
    """Return the layouts that fit, or tightly, for every number of GPUs, fastest first."""
    found = []
    tokens = step_tokens(config, config.dpo, lengths)
    for count in counts:
        at_count = []
        for job in jobs(config, gpu, lengths, count):
            memory = planned_memory(config, job, margin)
            fits = fit(memory, gpu)
            if fits != "does not fit":
                largest = max(stage.total for stage in memory) / GIB
                at_count.append(Found(count, job.layout, job.recompute, largest, fits, measure(job, tokens)))
        found += sorted(at_count, key=lambda each: each.step.total)
    return found


def jobs(config: Config, gpu: GpuModel, lengths: Lengths, gpus: int) -> Iterator[Job]:
    """Yield every layout that divides the model, with and without recompute."""
    for layout in layouts(config.model.sizes, gpus, gpu.gpus_per_nvlink, config.dpo.packed_sequence_size is not None):
        job = training_job(config, config.dpo, layout, gpu, lengths)
        if layout.vpp > 1 and job.micro_batches % layout.pp:
            continue  # Megatron's interleaved schedule takes whole groups of micro batches
        for recompute in RECOMPUTE:
            yield replace(job, recompute=recompute)


def layouts(shape: ModelSizes, gpus: int, node: int, packed: bool) -> Iterator[ParallelLayout]:
    """Yield layouts with TP within a node of `node` GPUs; packed rows are not cut by context parallelism."""
    for tp in (1, 2, 4, 8):
        if tp > node or shape.heads % tp or shape.groups % tp or shape.ffn % tp:
            continue
        for pp in divisors(shape.num_layers, LARGEST_PP):
            for cp in (1,) if packed else (1, 2, 4, LARGEST_CP):
                if gpus % (tp * pp * cp):
                    continue
                for vpp in divisors(shape.num_layers // pp, MOST_CHUNKS) if pp > 1 else (1,):
                    yield ParallelLayout(tp, pp, cp, gpus // (tp * pp * cp), vpp, sequence_parallel=tp > 1)


def divisors(number: int, largest: int) -> list[int]:
    """Return the divisors of a number up to `largest`, rising."""
    return [size for size in range(1, largest + 1) if number % size == 0]
