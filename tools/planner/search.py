"""Layouts, packs and recompute of a number of GPUs that fit, or tightly, by the hours of the whole run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from srlm_mega.config import Config
from srlm_mega.config.model_sizes import GIB, ModelSizes
from srlm_mega.config.training import PackNumber
from srlm_mega.gpus import GpuModel
from srlm_mega.tools.planner.job import Job, ParallelLayout, Recompute
from srlm_mega.tools.planner.memory import MARGIN, Fit, fit
from srlm_mega.tools.planner.training_steps import Lengths, StepTime, measure, planned_memory, step_tokens, training_job
from srlm_mega.tools.planner.whole_run import Cluster, run_times

COUNTS = (16, 32, 64, 128, 256, 512, 1024)
LARGEST_PP, LARGEST_CP, MOST_CHUNKS = 16, 8, 5
RECOMPUTE: tuple[Recompute, ...] = ("none", "full")  # selective repeats nothing that flash attention keeps


@dataclass(frozen=True)
class Found:
    """A layout that fits, or tightly, with a DPO step on it, and the hours of the whole run."""

    gpus: int
    layout: ParallelLayout
    packs: PackNumber
    recompute: Recompute
    memory_gib: float  # of the fullest stage, margin included
    fits: Fit
    step: StepTime
    hours: float
    processes_per_node: int
    sampler_gpus: int  # in whole replicas

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the run, which is what it costs."""
        return self.hours * self.gpus


def search(
    config: Config, gpu: GpuModel, lengths: Lengths, counts: Sequence[int], margin: float = MARGIN
) -> list[Found]:
    """Return the layouts that fit, or tightly, for every number of GPUs, each with the packs that suit it best, fastest
    run first. All GPUs sample."""
    found, packed = list[Found](), config.dpo.packed_sequence_size is not None
    for count in counts:
        if count < config.sampler.devices_per_replica:
            continue
        clusters = [
            Cluster(gpu, layout, count) for layout in layouts(config.model.sizes, count, gpu.gpus_per_nvlink, packed)
        ]
        tried = [best_packs(config, each, lengths, recompute, margin) for each in clusters for recompute in RECOMPUTE]
        found += sorted((one for one in tried if one is not None), key=lambda each: each.hours)
    return found


def best_packs(config: Config, cluster: Cluster, lengths: Lengths, recompute: Recompute, margin: float) -> Found | None:
    """Return a layout with the packs whose DPO step is fastest of those that fit or, if none does, tightly; else
    None."""
    tokens = step_tokens(config, config.dpo, lengths)
    tried = list[tuple[StepTime, PackNumber, Config, Job]]()
    for packs in pack_numbers(config, cluster.layout):
        variant = with_settings(config, packs, recompute)
        job = training_job(variant, variant.dpo, cluster.layout, cluster.gpu, lengths)
        tried.append((measure(job, tokens), packs, variant, job))
    tight: Found | None = None
    for step, packs, variant, job in sorted(tried, key=lambda each: each[0].total):
        memory = planned_memory(variant, job, margin)
        fits = fit(memory, cluster.gpu)
        if fits == "does not fit" or (fits == "tight" and tight is not None):
            continue
        hours = sum(time.hours for time in run_times(variant, cluster, lengths))
        largest = max(stage.total for stage in memory) / GIB
        layout, each = cluster.layout, config.sampler.devices_per_replica
        nodes = processes_per_node(config, layout), max(1, cluster.gpus // each) * each
        one = Found(cluster.gpus, layout, packs, recompute, largest, fits, step, hours, *nodes)
        if fits == "fits":
            return one
        tight = one
    return tight


def processes_per_node(config: Config, layout: ParallelLayout) -> int:
    """Return how many ranks of a layout are on each node: as many as a node of the configuration has GPUs, or the most
    that divide all, with whole groups of TP."""
    most = max(config.launch.processes_per_node, config.sampler.devices_per_node)
    return max((size for size in divisors(layout.gpus, most) if size % layout.tp == 0), default=layout.tp)


def pack_numbers(config: Config, layout: ParallelLayout) -> list[PackNumber]:
    """Return the numbers of packs to try: by rule first, then multiples of the stages, up to one for each pair. Only
    the default where DPO or SFT, which has the same, is not packed."""
    if None in (config.dpo.packed_sequence_size, config.sft.packed_sequence_size):
        return ["fewest"]
    pairs = -(-config.dpo.global_batch_size // layout.dp)
    return ["auto", "fewest", *(number for number in (layout.pp, 2 * layout.pp, 4 * layout.pp) if number <= pairs)]


def with_settings(config: Config, packs: PackNumber, recompute: Recompute) -> Config:
    """Return a configuration with other packs, of SFT too, and recompute."""
    trainer = {"recompute_granularity": None if recompute == "none" else recompute}
    return config.model_copy(
        update={
            "dpo": config.dpo.model_copy(update={"packs": packs}),
            "sft": config.sft.model_copy(update={"packs": packs}),
            "trainer": config.trainer.model_copy(update=trainer),
        }
    )


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
