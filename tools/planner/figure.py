"""A plan as a picture: memory by stage, a step's seconds, the run's hours."""

from pathlib import Path

from matplotlib.figure import Figure

from srlm_mega.config.model_sizes import GIB
from srlm_mega.errors import UserError
from srlm_mega.tools.planner.show import MEMORY_PARTS, RunPlan, header, part_bytes


def draw(plan: RunPlan, path: Path) -> None:
    """Draw the plan in the format of the file's name. UserError where it cannot be written."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    figure.suptitle(header(plan), fontsize=10)
    memory, step, run = figure.subplots(1, 3)
    stages = [str(stage.stage) for stage in plan.memory]
    below = [0.0] * len(stages)
    for part in MEMORY_PARTS:
        sizes = [part_bytes(stage, part) / GIB for stage in plan.memory]
        memory.bar(stages, sizes, bottom=below, label=part)
        below = [a + b for a, b in zip(below, sizes, strict=True)]
    memory.axhline(plan.cluster.gpu.memory_gib, color="black", linestyle="--", label=f"a {plan.cluster.gpu.name} has")
    memory.set(title="Memory of a GPU", xlabel="pipeline stage", ylabel="GiB")
    memory.legend(fontsize=7)
    step.barh(list(plan.step.seconds)[::-1], list(plan.step.seconds.values())[::-1])
    step.set(title=f"A DPO step, MFU {plan.step.mfu:.0%}", xlabel="seconds")
    labels = [f"{time.name} {time.what}" for time in plan.times]
    run.barh(range(len(labels)), [time.hours for time in plan.times][::-1], tick_label=labels[::-1])
    run.tick_params(axis="y", labelsize=6)
    run.set(title=f"The run, {plan.gpu_hours:,.0f} GPU-hours", xlabel="hours")
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise UserError(f"--figure {path}: {error}") from None
