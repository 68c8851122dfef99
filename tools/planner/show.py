"""The planner's results as text and as JSON."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from srlm_mega.config.model_sizes import GIB
from srlm_mega.gpus import GpuModel
from srlm_mega.tools.planner.advice import run_advice, step_advice
from srlm_mega.tools.planner.communication import (
    context_parallel_seconds,
    data_parallel_seconds,
    pipeline_seconds,
    tensor_parallel_seconds,
)
from srlm_mega.tools.planner.job import Job, Layers
from srlm_mega.tools.planner.memory import LIBRARY_BYTES, Fit, StageMemory, fit
from srlm_mega.tools.planner.search import Found
from srlm_mega.tools.planner.step_time import layers_per_stage, stage_parameters
from srlm_mega.tools.planner.training_steps import Lengths, StepTime
from srlm_mega.tools.planner.whole_run import Cluster, StageTime

MEMORY_PARTS = (
    "weights", "gradients", "optimizer", "activations", "temporaries", "head", "communication", "cp_buffers",
    "pp_buffers", "margin",
)  # fmt: skip
VERDICTS: dict[Fit, str] = {
    "fits": "fits",
    "tight": "TIGHT, it fits only without the margin",
    "does not fit": "DOES NOT FIT",
}
LAYERS: dict[Layers, str] = {
    "torch": "torch (Transformer Engine's, which model.layer_backend=auto takes where it is installed, keep less)",
    "transformer_engine": "Transformer Engine's",
    "compiled": "compiled",
}
FOR_CPUS = (
    "This configuration is of CPUs (trainer.device=cpu), whose speed and memory are not planned. Assumed in their "
    "place: {gpus} x {gpu}, one for every process, NCCL, and for fp32 the speed of TF32."
)


@dataclass(frozen=True)
class RunPlan:
    """The result of `srlm plan CONFIG`."""

    cluster: Cluster
    job: Job  # a DPO step
    lengths: Lengths
    memory: list[StageMemory]
    step: StepTime
    times: list[StageTime]
    price: float  # per GPU and hour
    for_cpus: bool  # what the configuration says

    @property
    def hours(self) -> float:
        """Hours of the whole run."""
        return sum(time.hours for time in self.times)

    @property
    def gpu_hours(self) -> float:
        """GPU-hours that are paid for: the allocation holds its GPUs from start to end."""
        return self.hours * self.cluster.gpus

    @property
    def fullest(self) -> float:
        """Bytes of the pipeline stage that needs most, margin included."""
        return max(stage.total for stage in self.memory)

    @property
    def fits(self) -> Fit:
        """Whether every pipeline stage fits the device."""
        return fit(self.memory, self.cluster.gpu)


def plan_text(plan: RunPlan) -> str:
    """Return the plan as tables for a terminal."""
    has_fp8, lengths = plan.cluster.gpu.peak.fp8 is not None, plan.lengths
    texts = (
        header(plan),
        *((FOR_CPUS.format(gpu=plan.cluster.gpu.name, gpus=plan.cluster.gpus),) if plan.for_cpus else ()),
        memory_table(plan.memory, plan.cluster.gpu),
        f"Layers assumed: {LAYERS[plan.job.stack.layers]}. `srlm rehearse CONFIG` checks this memory.",
        step_table(plan.step),
        message_table(plan),
        step_advice(plan.step.seconds, has_fp8),
        run_table(plan),
        run_advice(plan.times, has_fp8),
        f"Assumed mean tokens: prompt {lengths.prompt}, response {lengths.response}, judgement {lengths.judgement}. "
        "Planned, not measured; docs/planner.md says how far off published runs are.",
    )
    return "\n\n".join(texts)


def header(plan: RunPlan) -> str:
    """Return a line about what is planned, and whether it fits."""
    gpu = plan.cluster.gpu
    return (
        f"{plan.cluster.gpus} x {gpu.name}, {plan.job.layout}, {plan.job.precision}, recompute {plan.job.recompute}: "
        f"{VERDICTS[plan.fits]} ({plan.fullest / GIB:.1f} of {gpu.memory_gib:.1f} GiB)"
    )


def memory_table(memory: Sequence[StageMemory], gpu: GpuModel) -> str:
    """Return the GiB of every pipeline stage."""
    rows = [["stage", *MEMORY_PARTS, "total", "of device"]]
    for stage in memory:
        sizes = [part_bytes(stage, part) / GIB for part in MEMORY_PARTS]
        rows.append(
            [str(stage.stage), *(f"{size:.2f}" for size in sizes), f"{stage.total / GIB:.2f}",
             f"{stage.total / gpu.memory_bytes:.0%}"]
        )  # fmt: skip
    share = memory[0].allocator_share
    return (
        "Memory of a GPU by pipeline stage, GiB: the longest sequences, a full pipeline, gradients in fp32. The margin "
        f"is assumed: {share:.0%} for the allocator and {LIBRARY_BYTES / GIB:g} GiB for libraries.\n{table(rows)}"
    )


def part_bytes(stage: StageMemory, part: str) -> float:
    """Return the bytes of one of MEMORY_PARTS."""
    return stage.margin if part == "margin" else float(vars(stage)[part])


def step_table(step: StepTime) -> str:
    """Return the parts of a DPO step's time."""
    rows = [["", "seconds", "share"]]
    rows += [[name, f"{value:.3f}", f"{value / step.total:.0%}"] for name, value in step.seconds.items()]
    rows.append(["a step", f"{step.total:.3f}", f"{step.tokens:,.0f} tokens, MFU {step.mfu:.0%} (causal)"])
    return "A DPO step\n" + table(rows)


@dataclass(frozen=True)
class Messages:
    """A step's messages along one axis. `alone`: seconds at the link's speed without other work; `exposed`: seconds
    that they add to the step, at the speed and with the overlap of published runs."""

    axis: str
    link: str
    alone: float
    exposed: float


def messages(job: Job, step: StepTime) -> list[Messages]:
    """Return the messages of every axis that has more than one rank."""
    layout, layers, count = job.layout, layers_per_stage(job), job.micro_batches
    of_axes = (
        ("TP", layout.tp, 1, tensor_parallel_seconds(job, layers) * count),
        ("CP", layout.cp, layout.tp, context_parallel_seconds(job, layers) * count),
        ("PP", layout.pp, layout.tp * layout.cp * layout.dp, pipeline_seconds(job) * count),
        ("DP", layout.dp * layout.cp, layout.tp, data_parallel_seconds(job, stage_parameters(job))),
    )
    return [
        Messages(axis, link(job, size, stride), alone, step.seconds[f"{axis} messages"])
        for axis, size, stride, alone in of_axes
        if size > 1
    ]


def link(job: Job, size: int, stride: int) -> str:
    """Return the link of a group of `size` ranks that stand `stride` apart."""
    return "NVLink" if size * stride <= job.gpu.gpus_per_nvlink else "network"


def message_table(plan: RunPlan) -> str:
    """Return the links of messages, their seconds, and how many of them add to the step."""
    rows = [["messages", "over", "seconds alone", "exposed"]]
    for each in messages(plan.job, plan.step):
        rows.append([each.axis, each.link, f"{each.alone:.3f}", f"{each.exposed:.3f}"])
    return table(rows) if len(rows) > 1 else "No messages between GPUs."


def run_table(plan: RunPlan) -> str:
    """Return the hours of every stage, and the cost of the run."""
    rows = [["stage", "", "GPUs busy", "hours", "output tokens/s/GPU"]]
    for time in plan.times:
        rate = f"{time.tokens_per_second:,.0f}" if time.tokens_per_second else ""
        rows.append([time.name, time.what, str(time.gpus), f"{time.hours:.2f}", rate])
    cost = f", {plan.gpu_hours * plan.price:,.0f} at {plan.price:g} per GPU-hour" if plan.price else ""
    return f"{table(rows)}\nThe run: {plan.hours:.1f} hours, {plan.gpu_hours:,.0f} GPU-hours{cost}"


def search_text(found: Sequence[Found], best: int = 3) -> str:
    """Return the best layouts of each number of GPUs, and the options of the fastest and of the cheapest run."""
    rows = [
        ["GPUs", "layout", "packs", "recompute", "GiB", "fits", "s / step", "MFU", "most time in", "hours", "GPU-hours"]
    ]
    for each in shown(found, best):
        rows.append(
            [str(each.gpus), str(each.layout), str(each.packs), each.recompute, f"{each.memory_gib:.1f}", each.fits,
             f"{each.step.total:.3f}", f"{each.step.mfu:.0%}", each.step.dominant, f"{each.hours:.2f}",
             f"{each.gpu_hours:,.0f}"]
        )  # fmt: skip
    if not found:
        return "No layout fits: more GPUs, or GPUs with more memory."
    safe = [each for each in found if each.fits == "fits"]
    tight = f"{len(found) - len(safe)} are tight: they fit only without the margin."
    if not safe:
        return f"{table(rows)}\nNo layout fits with the margin; {tight}"
    fastest, cheapest = min(safe, key=lambda each: each.hours), min(safe, key=lambda each: each.gpu_hours)
    return (
        f"Hours and GPU-hours are of the whole run.\n{table(rows)}\nOf {len(safe)} layouts that fit the fastest run is "
        f"on {fastest.gpus} GPUs:\n  {options(fastest)}\nThe cheapest is on {cheapest.gpus}:\n  {options(cheapest)}\n"
        f"{tight}"
    )


def options(found: Found) -> str:
    """Return the options that make a configuration what was found."""
    layout, recompute, nodes = found.layout, found.recompute, found.gpus // found.processes_per_node
    values = {
        "launch.nodes": nodes,
        "launch.processes_per_node": found.processes_per_node,
        **({"launch.launcher": "slurm", "sampler.slurm": "true"} if nodes > 1 else {}),
        "sampler.num_devices": found.sampler_gpus,
        "parallel.tensor_model_parallel_size": layout.tp,
        "parallel.pipeline_model_parallel_size": layout.pp,
        "parallel.virtual_pipeline_model_parallel_size": "null" if layout.vpp == 1 else layout.vpp,
        "parallel.context_parallel_size": layout.cp,
        "parallel.data_parallel_size": layout.dp,
        "parallel.sequence_parallel": str(layout.sequence_parallel).lower(),
        "parallel.use_distributed_optimizer": str(layout.distributed_optimizer).lower(),
        "parallel.overlap_grad_reduce": str(layout.overlap_grad_reduce).lower(),
        "parallel.overlap_param_gather": str(layout.overlap_param_gather).lower(),
        "dpo.packs": found.packs,
        "sft.packs": found.packs,
        "trainer.recompute_granularity": "null" if recompute == "none" else recompute,
    }
    return " ".join(f"{key}={value}" for key, value in values.items())


def shown(found: Sequence[Found], best: int) -> Iterator[Found]:
    """Yield the best layouts that fit, for each number of GPUs, among the best tight ones."""
    taken: Counter[tuple[int, Fit]] = Counter()
    for each in found:
        taken[each.gpus, each.fits] += 1
        if taken[each.gpus, each.fits] <= best:
            yield each


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table with aligned columns: words to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numbers = [all(not row[column] or row[column][0].isdigit() for row in rows[1:]) for column in range(len(widths))]

    def cell(text: str, column: int) -> str:
        return text.rjust(widths[column]) if numbers[column] else text.ljust(widths[column])

    return "\n".join("  ".join(cell(text, column) for column, text in enumerate(row)).rstrip() for row in rows)


def plan_json(plan: RunPlan) -> dict[str, Any]:
    """Return the plan for programs; seconds, bytes and hours as numbers."""
    step = plan.step
    return {
        "gpu": plan.cluster.gpu.name,
        "configured_for": "cpu" if plan.for_cpus else "cuda",
        "gpus": plan.cluster.gpus,
        "layout": asdict(plan.job.layout),
        "precision": plan.job.precision,
        "layers": plan.job.stack.layers,
        "fits": plan.fits,
        "memory": [asdict(stage) | {"margin": stage.margin, "total": stage.total} for stage in plan.memory],
        "step": {"seconds": step.seconds, "total": step.total, "tokens": step.tokens, "mfu": step.mfu},
        "messages": [asdict(each) for each in messages(plan.job, step)],
        "stages": [{key: value for key, value in vars(time).items() if key != "estimate"} for time in plan.times],
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "cost": plan.gpu_hours * plan.price,
        "assumed_tokens": asdict(plan.lengths),
    }


def search_json(found: Sequence[Found]) -> list[dict[str, Any]]:
    """Return every layout that fits, for programs."""
    return [
        {key: value for key, value in asdict(each).items() if key != "step"}
        | {
            "gpu_hours": each.gpu_hours,
            "step_seconds": each.step.total,
            "mfu": each.step.mfu,
            "parts": each.step.seconds,
        }
        for each in found
    ]
