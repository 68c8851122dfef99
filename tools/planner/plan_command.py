"""`srlm plan`: its results as text."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from srlm_mega.config import Config
from srlm_mega.config.file import load_config
from srlm_mega.errors import UserError
from srlm_mega.gpus import GpuModel
from srlm_mega.tools.planner.memory import MARGIN
from srlm_mega.tools.planner.points import Unreadable, predict, read_points
from srlm_mega.tools.planner.search import COUNTS, layouts, search
from srlm_mega.tools.planner.show import RunPlan, plan_json, plan_text, search_json, search_text, table
from srlm_mega.tools.planner.training_steps import (
    Lengths,
    layout_of,
    measure,
    planned_memory,
    step_tokens,
    training_job,
)
from srlm_mega.tools.planner.whole_run import Cluster, run_times


@dataclass(frozen=True)
class PlanRequest:
    """The options of the command; `price` is of a GPU-hour, `margin` the allocator's share of memory."""

    config_file: Path
    overrides: tuple[str, ...]
    gpu: GpuModel
    gpus: int | None
    lengths: Lengths
    price: float
    margin: float = MARGIN

    @property
    def config(self) -> Config:
        """The configuration with its overrides."""
        return load_config(self.config_file, self.overrides)


def planned(request: PlanRequest, json: bool, figure: Path | None) -> str:
    """Plan the memory, a DPO step and every stage of a run, and draw them to `figure` where one is named."""
    plan = make_plan(request)
    if figure is not None:
        from srlm_mega.tools.planner.figure import draw

        draw(plan, figure)
    return dumps(plan_json(plan)) if json else plan_text(plan)


def make_plan(request: PlanRequest) -> RunPlan:
    """Plan a run. --gpus makes as many replicas as it divides into, and all of them sample. UserError where it does
    not divide."""
    config, gpu = request.config, request.gpu
    layout, sampler_gpus = layout_of(config), config.sampler.num_devices
    if request.gpus is not None:
        size = config.parallel.model_parallel_size
        if request.gpus % size:
            raise UserError(f"--gpus {request.gpus} is not divisible by TP * PP * CP = {size}; try --search")
        if request.gpus < (each := config.sampler.devices_per_replica):
            raise UserError(f"--gpus {request.gpus}: {replica_size(each)}; set sampler.tp_size and sampler.pp_size")
        layout, sampler_gpus = replace(layout, dp=request.gpus // size), request.gpus
    cluster = Cluster(gpu, layout, sampler_gpus)
    job = training_job(config, config.dpo, layout, gpu, request.lengths)
    step = measure(job, step_tokens(config, config.dpo, request.lengths))
    memory = planned_memory(config, job, request.margin)
    times = run_times(config, cluster, request.lengths)
    return RunPlan(cluster, job, request.lengths, memory, step, times, request.price, config.trainer.device == "cpu")


def searched(request: PlanRequest, json: bool) -> str:
    """Search the layouts of --gpus, or of 16 to 1024 GPUs."""
    config, gpu = request.config, request.gpu
    counts = COUNTS if request.gpus is None else (request.gpus,)
    found = search(config, gpu, request.lengths, counts, request.margin)
    if json:
        return dumps(search_json(found))
    if found or request.gpus is None:
        return search_text(found)
    packed = config.dpo.packed_sequence_size is not None
    sizes = sorted(
        {each.model_parallel for each in layouts(config.model.sizes, request.gpus, gpu.gpus_per_nvlink, packed)}
    )
    tried = ", ".join(map(str, sizes))
    text = f"{search_text(found)} Of {request.gpus} GPUs TP * PP * CP can be {tried}."
    each = config.sampler.devices_per_replica
    return f"{text} And {replica_size(each)}." if request.gpus < each else text


def replica_size(gpus: int) -> str:
    """Say how many GPUs a replica of the sampler takes."""
    return f"a replica of the sampler takes {gpus} GPUs (sampler.tp_size * sampler.pp_size)"


def predictions(path: Path, json: bool, margin: float = MARGIN) -> str:
    """Predict tokens/s/GPU, seconds per step and GiB of every point of a file, and whether it fits."""
    rows = [predict(point, margin) for point in read_points(path)]
    if json:
        return dumps([asdict(row) for row in rows])
    lines = [["point", "tokens/s/GPU", "s / step", "GiB", "fits", "assumed"]]
    for row in rows:
        if isinstance(row, Unreadable):
            lines.append([row.id, "", "", "", "", f"not predicted: {row.error}"])
        else:
            figures = [f"{row.tokens_per_sec_per_gpu:,.0f}", f"{row.step_time_s:.3f}", f"{row.memory_gib:.1f}"]
            lines.append([row.id, *figures, row.fits, "; ".join(row.assumed)])
    return table(lines)


def dumps(value: Any) -> str:
    """Return a value as indented JSON."""
    return orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()
