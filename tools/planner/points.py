"""Published training throughput as jobs; stated defaults stand for everything that a publication leaves out.

points.json holds the points that the model is calibrated on, each with its source. `srlm plan --points FILE` reads the
same form, and ignores measured fields and unknown ones.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from srlm_mega.config.model_sizes import GIB, ModelSizes, flops_per_token
from srlm_mega.config.training import Precision
from srlm_mega.errors import UserError
from srlm_mega.gpus import find_gpu
from srlm_mega.tools.planner.job import MEGATRON, Job, ParallelLayout, Recompute, Stack
from srlm_mega.tools.planner.memory import MARGIN, Fit, fit, stage_memory
from srlm_mega.tools.planner.shapes import find_shape
from srlm_mega.tools.planner.step_time import FITTED, step_quantities

CALIBRATION_FILE = Path(__file__).parent / "points.json"
CONVENTIONS = {"full-attention": 2.0, "causal": 1.0, "linear-only": 0.0}  # model FLOP: how its name begins, and its a
DEFAULTS: dict[str, Any] = {"gpu": "H100", "precision": "bf16", "seq_length": 4096}
PACKED_SEQUENCES = 4  # assumed in a packed row, whose attention does not cross them
ENDS = 2  # embedding and head, which count as a layer each where layers do not divide
LARGEST_MICRO_BATCH = 4  # that is guessed
FLASH2_BEFORE = (24, 5)  # NeMo releases before it ran FlashAttention 2 on H100s
TUNED_SINCE = (25, 1)
FIELDS = frozenset(
    ("id", "model", "task", "gpu", "n_gpus", "precision", "global_batch_size", "micro_batch_size", "seq_length",
     "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "virtual_pipeline",
     "tokens_per_sec_per_gpu", "tokens_per_sec_per_gpu_derived", "tflops_per_gpu", "step_time_s", "flop_convention",
     "recompute", "memory_gib", "stack", "fsdp", "source", "note", "family")
)  # fmt: skip

BRIDGE = replace(MEGATRON, tuned=True, fused_loss=True, gradient_bytes=2)  # its recipes for benchmarks
TORCHTITAN = Stack(
    "torchtitan", "compiled", flash2=True, overlaps_tensor_parallel=False, selective_recompute=0.5, ring_in_blocks=True
)
FOUNDRY = Stack("llm-foundry", "compiled", flash2=True, fused_loss=True)  # no rotary embeddings: keeps as much
MAXTEXT = Stack("maxtext", "compiled")


@dataclass(frozen=True)
class Point:
    """A published run as a job. Measured values are None where the publication has none."""

    id: str
    family: str
    job: Job
    memory_job: Job  # the same, with recompute where the publication does not mention it
    assumed: tuple[str, ...]  # in words
    ignored: tuple[str, ...]  # unknown fields
    tokens_per_second: float | None  # per GPU
    memory_gib: float | None


@dataclass(frozen=True)
class Unreadable:
    """A point that cannot be a job: a model, GPU or precision that is not modelled, a layout that does not divide."""

    id: str
    error: str
    tokens_per_sec_per_gpu: None = None
    step_time_s: None = None
    memory_gib: None = None
    fits: None = None


@dataclass(frozen=True)
class Prediction:
    """The planned speed and memory of a point. `memory_gib`: of the fullest stage, margin included."""

    id: str
    tokens_per_sec_per_gpu: float
    step_time_s: float
    memory_gib: float
    memory_gib_by_stage: tuple[float, ...]
    fits: Fit
    tflops_per_gpu_causal: float
    assumed: tuple[str, ...]
    ignored: tuple[str, ...]


def predict(point: Point | Unreadable, margin: float = MARGIN) -> Prediction | Unreadable:
    """Plan a point: tokens per second and GPU, seconds of a step, memory and whether it fits."""
    if isinstance(point, Unreadable):
        return point
    job = point.job
    seconds = sum(step_quantities(job).times(FITTED).values)
    speed = job.tokens_per_step / seconds / job.layout.gpus
    tflops = speed * flops_per_token(job.shape, job.seq_length) / 1e12
    stages = stage_memory(point.memory_job, margin)
    memory, fits = tuple(stage.total / GIB for stage in stages), fit(stages, job.gpu)
    return Prediction(point.id, speed, seconds, max(memory), memory, fits, tflops, point.assumed, point.ignored)


def read_points(path: Path) -> list[Point | Unreadable]:
    """Read all points of a file. UserError where it is no list of points."""
    try:
        rows = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} must be a list of objects, each a point as in tools/planner/points.json")
    return parse_points(rows)


def parse_points(rows: Sequence[Mapping[str, Any]]) -> list[Point | Unreadable]:
    """Return each row as a point, or the reason why it cannot be one."""
    points: list[Point | Unreadable] = []
    for number, row in enumerate(rows):
        try:
            points.append(read_point(row, number))
        except (UserError, ValueError, TypeError, ZeroDivisionError) as error:
            points.append(Unreadable(str(row.get("id", f"point {number}")), str(error)))
    return points


def read_point(row: Mapping[str, Any], number: int = 0) -> Point:
    """Read one point; absent and null are the same. UserError, ValueError, ... where it cannot be a job."""
    given = {key: value for key, value in row.items() if value is not None}
    name = str(given.get("id", f"point {number}"))
    if "model" not in given:
        raise UserError(f"{name}: model is missing; everything else has a default")
    shape = find_shape(str(given["model"]))
    assumed = [f"{key} {default}" for key, default in DEFAULTS.items() if key not in given]
    given = DEFAULTS | given
    job = _job(given, shape, assumed)
    memory_job = job if "recompute" in given else _with_recompute(job, assumed)
    if not fits_without_margin(memory_job) and not job.stack.fused_loss:
        memory_job = replace(memory_job, stack=replace(job.stack, fused_loss=True))
        assumed.append("a fused loss, in memory alone")
    if not fits_without_margin(memory_job):
        assumed.append("does not fit as published: some recompute or offloading is not told")
    family = str(given.get("family", f"{given['model']}|{job.stack.name}|{job.precision}|{job.seq_length}"))
    ignored = tuple(sorted(set(given) - FIELDS))
    speed, memory_gib = _measured(given, job), _positive(given.get("memory_gib"))
    return Point(name, family, job, memory_job, tuple(assumed), ignored, speed, memory_gib)


def _job(given: Mapping[str, Any], shape: ModelSizes, assumed: list[str]) -> Job:
    """Return the job; everything that had to be assumed is added to `assumed`."""

    def value(key: str, default: int, tell: bool = True) -> int:
        if key in given:
            return whole(given, key)
        if tell:
            assumed.append(f"{key} {default}")
        return default

    task, stack = str(given.get("task", "pretrain")), str(given.get("stack", "Megatron"))
    tp, pp = value("tensor_model_parallel_size", 1), value("pipeline_model_parallel_size", 1)
    cp, fsdp = value("context_parallel_size", 1), value("fsdp", 1, tell=False)
    if pp > shape.num_layers or tp > shape.heads:
        raise UserError(f"PP {pp} and TP {tp} are too many for {shape.num_layers} layers of {shape.heads} heads")
    gpus = value("n_gpus", 8 * max(1, tp * pp * cp // 8))
    if gpus % (tp * pp * cp):
        raise UserError(f"{given.get('id')}: {gpus} GPUs are not divisible by TP {tp} * PP {pp} * CP {cp}")
    dp = gpus // (tp * pp * cp)
    words = str(given["precision"]).lower()
    seq_length = whole(given, "seq_length")
    framework = stack_of(stack, str(given.get("source", "")))
    job = Job(
        shape,
        find_gpu(str(given["gpu"])),
        ParallelLayout(tp, pp, cp, dp, 1, sequence_parallel=tp > 1, fsdp=fsdp),
        _precision(words),
        1,
        value("global_batch_size", 16 * dp * pp),
        seq_length,
        _recompute(given, assumed),
        framework,
        current_scaling="current" in words or "tensorwise" in words,
        frozen="lora" in task,
        gradient_bytes=framework.gradient_bytes,
        attended_length=max(1, seq_length // PACKED_SEQUENCES) if "packed" in task else None,
    )
    # What fits decides the micro batch, and the number of micro batches the chunks: one guess after the other.
    likely = _likely_micro_batch(job, max(1, job.global_batch // dp))
    job = replace(job, micro_batch=value("micro_batch_size", likely))
    if job.global_batch < dp * job.micro_batch:
        assumed.append(f"global_batch_size is below DP * micro_batch_size = {dp * job.micro_batch}, which is timed")
    vpp = value("virtual_pipeline", 1, tell=False)
    if vpp * pp > shape.num_layers + ENDS:
        raise UserError(f"virtual_pipeline {vpp} * PP {pp} are more chunks than {shape.num_layers} layers")
    if pp > 1:
        vpp = value("virtual_pipeline", _likely_chunks(job, stack))
    return _as_it_fitted(replace(job, layout=replace(job.layout, vpp=vpp)), assumed)


def whole(given: Mapping[str, Any], key: str) -> int:
    """Read a size, also written as 8.0 or "8". UserError for anything else."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})(\.0)?", str(given[key]), re.ASCII)
    if found is None:
        raise UserError(f"{key} must be a whole number from 1, got {given[key]!r}")
    return int(found[1])


def stack_of(name: str, source: str) -> Stack:
    """Return the framework that a publication's words name, as of the release that its source names."""
    words = name.lower()
    if "titan" in words:
        compiles_loss = re.search("20(2[5-9])", source) is not None  # turned off for its tables of December 2024
        return replace(TORCHTITAN, overlaps_tensor_parallel="async" in words, fused_loss=compiles_loss)
    if "foundry" in words:
        return FOUNDRY
    if "maxtext" in words or "jax" in words:
        return MAXTEXT
    if "Megatron-Bridge" in source:
        return BRIDGE
    found = re.search(r"(?:NeMo |\(v)(\d\d)\.(\d\d)", source)
    release = (int(found[1]), int(found[2])) if found else FLASH2_BEFORE
    return replace(MEGATRON, flash2=release < FLASH2_BEFORE, tuned=release >= TUNED_SINCE)


def _precision(words: str) -> Precision:
    if not re.search("fp4|fp6", words):
        if re.search("fp8|float8", words):
            return "fp8"
        if re.search("bf16|bfloat16", words):
            return "bf16"
    raise UserError(f"precision {words!r} is not modelled: bf16 and fp8 are")


def _recompute(given: Mapping[str, Any], assumed: list[str]) -> Recompute:
    """Return the first mode that a publication's words name."""
    modes: tuple[Recompute, ...] = ("full", "selective", "none")
    words = str(given.get("recompute", "none")).lower()
    named = sorted((mode for mode in modes if mode in words), key=words.index)
    if named:
        return named[0]
    assumed.append(f"recompute none for {words!r}")
    return "none"


def _likely_micro_batch(job: Job, per_replica: int) -> int:
    """Guess the sequences of a micro batch: as many as fit without a pipeline; with one 1, for a small bubble, or
    torchtitan's default, a micro batch per stage."""
    if job.layout.pp > 1:
        return max(1, per_replica // job.layout.pp) if job.stack.name == "torchtitan" else 1
    sizes = [size for size in (LARGEST_MICRO_BATCH, 2) if per_replica % size == 0]
    return next((size for size in sizes if fits_without_margin(replace(job, micro_batch=size))), 1)


def _likely_chunks(job: Job, stack: str) -> int:
    """Guess the model chunks per stage: Megatron's tables interleave down to one layer where micro batches divide;
    torchtitan's interleaved schedule has two."""
    if job.stack.name == "torchtitan":
        return 2 if "interleaved" in stack.lower() else 1
    if job.micro_batches % job.layout.pp:
        return 1
    layers, pp = job.shape.num_layers, job.layout.pp
    return max(1, (layers if layers % pp == 0 else layers + ENDS) // pp)


def _as_it_fitted(job: Job, assumed: list[str]) -> Job:
    """Assume what makes a published run fit its GPU: gradients in bf16, then FP8 weights without a bf16 copy."""
    if not fits_without_margin(job) and job.layout.fsdp == 1:
        job = replace(job, gradient_bytes=2)
        assumed.append("gradients in bf16")
    if not fits_without_margin(job) and job.layout.fsdp == 1 and job.precision == "fp8":
        job = replace(job, fp8_weights=True)
        assumed.append("no bf16 copy of FP8 weights")
    return job


def _with_recompute(job: Job, assumed: list[str]) -> Job:
    """Return the job with the least recompute that fits, for memory alone: without its time, published speeds are
    predicted better."""
    modes: tuple[Recompute, ...] = ("none", "selective", "full")
    mode = next((mode for mode in modes if fits_without_margin(replace(job, recompute=mode))), job.recompute)
    if mode != "none":
        assumed.append(f"recompute {mode}, in memory alone")
    return replace(job, recompute=mode)


def fits_without_margin(job: Job) -> bool:
    """Tell whether a job fits its GPU without the margin, as a run that was published did."""
    return fit(stage_memory(job), job.gpu) != "does not fit"


def published_flops_per_token(shape: ModelSizes, seq_length: int, convention: str) -> float:
    """Return FLOP per token by a publication's convention; "2/3" in its words: frozen weights have no gradients.
    ValueError for words that do not begin with one of CONVENTIONS, whose figures cannot be compared."""
    factor = next((a for word, a in CONVENTIONS.items() if convention.startswith(word)), None)
    if factor is None:
        raise ValueError(f"flop_convention {convention!r} does not begin with one of {', '.join(CONVENTIONS)}")
    return flops_per_token(shape, seq_length, factor) * (2 / 3 if "2/3" in convention else 1)


def _measured(given: Mapping[str, Any], job: Job) -> float | None:
    """Return tokens per second and GPU: published, or from the step's seconds, or from TFLOP/s and their convention.
    None where these are no positive numbers: a plan needs none."""
    seconds, tflops = _positive(given.get("step_time_s")), _positive(given.get("tflops_per_gpu"))
    if (speed := _positive(given.get("tokens_per_sec_per_gpu"))) is not None:
        return speed
    if seconds is not None and "n_gpus" in given and "global_batch_size" in given:
        return job.tokens_per_step / seconds / job.layout.gpus
    convention = str(given.get("flop_convention"))
    if tflops is not None and convention.startswith(tuple(CONVENTIONS)):
        return tflops * 1e12 / published_flops_per_token(job.shape, job.seq_length, convention)
    return None


def _positive(value: object) -> float | None:
    """Return a positive number as it is, None for anything else."""
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if 0 < number < math.inf else None
