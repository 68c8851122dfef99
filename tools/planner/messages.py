"""A step's messages: over which links, how long at link speed, and how much of it shows."""

from dataclasses import dataclass

from srlm_mega.tools.planner.communication import (
    context_parallel_seconds,
    data_parallel_seconds,
    pipeline_seconds,
    tensor_parallel_seconds,
)
from srlm_mega.tools.planner.job import Job
from srlm_mega.tools.planner.step_time import layers_per_stage, stage_parameters
from srlm_mega.tools.planner.training_steps import StepTime


@dataclass(frozen=True)
class Messages:
    """Of one axis in a step. `alone`: seconds at the link's speed with nothing beside them; `exposed`: what they add to
    the step, at the speed and with the overlap of published runs."""

    axis: str
    link: str
    alone: float
    exposed: float


def messages(job: Job, step: StepTime) -> list[Messages]:
    """Of every axis that has more than one rank."""
    layout, layers = job.layout, layers_per_stage(job)
    of_axes = (
        ("TP", layout.tp, 1, tensor_parallel_seconds(job, layers) * job.micro_batches),
        ("CP", layout.cp, layout.tp, context_parallel_seconds(job, layers) * job.micro_batches),
        ("PP", layout.pp, layout.tp * layout.cp * layout.dp, pipeline_seconds(job) * job.micro_batches),
        ("DP", layout.dp * layout.cp, layout.tp, data_parallel_seconds(job, stage_parameters(job))),
    )
    return [
        Messages(axis, link(job, size, stride), alone, step.seconds[f"{axis} messages"])
        for axis, size, stride, alone in of_axes
        if size > 1
    ]


def link(job: Job, size: int, stride: int) -> str:
    """What a group of `size` ranks that stand `stride` apart talks over."""
    return "NVLink" if size * stride <= job.gpu.gpus_per_nvlink else "network"
