"""TensorRT engines in a cache, built by NVIDIA's commands, each with a record of what it may be used for.

An engine serves only the versions, GPU, split and limits it was built for, and its weights; `engine.json` names them.
(Nothing here has run with TensorRT-LLM yet: it needs a GPU, and tests have stand-ins for the commands. The options are
those of trtllm-build and trtllm-refit 1.2.)
"""

import functools
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

import orjson
import xxhash

from srlm_mega.checkpoints_conversion.build import give_name, partial_folder
from srlm_mega.checkpoints_conversion.huggingface_files import CONFIG, pretty_json, read_json
from srlm_mega.checkpoints_conversion.parent_end import die_with
from srlm_mega.checkpoints_conversion.safetensors_file import read_header
from srlm_mega.checkpoints_conversion.trtllm import rank_file, read_split

RECORD = "engine.json"
BLOCK_BYTES = 4 * 1024**2
PROBE = (
    "import json, tensorrt, tensorrt_llm, torch; "
    "print(json.dumps({'tensorrt_llm': tensorrt_llm.__version__, 'tensorrt': tensorrt.__version__, "
    "'gpu_sm': '.'.join(map(str, torch.cuda.get_device_capability()))}))"
)


@dataclass(frozen=True)
class Limits:
    """The sizes that an engine is built for, in requests and tokens. `strip_plan` leaves the weights out, for
    `trtllm-refit` to put in. (trtllm-build says that it then assumes the same weights: whether others give the same
    speed and answers must be measured on a GPU.) ValueError for limits that exclude each other."""

    max_batch_size: int = 256
    max_num_tokens: int = 8192
    max_input_len: int = 3072
    max_seq_len: int = 4096
    use_paged_context_fmha: bool = True
    use_fp8_context_fmha: bool = False
    strip_plan: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.max_input_len < self.max_seq_len:
            raise ValueError(
                f"max_input_len {self.max_input_len} must be less than max_seq_len {self.max_seq_len}: "
                "answers need room"
            )
        if self.use_fp8_context_fmha and not self.use_paged_context_fmha:
            raise ValueError("use_fp8_context_fmha needs use_paged_context_fmha: turn both on, or the first off")


@dataclass(frozen=True)
class Runtime:
    """The machine that builds or runs an engine: versions, and the GPU's compute capability such as `9.0`."""

    tensorrt_llm: str
    tensorrt: str
    gpu_sm: str


@dataclass(frozen=True)
class EngineRecord:
    """`engine.json`. `model_hash` covers shapes and config, `scales_hash` FP8 scales, `weights_hash` the weights."""

    tensorrt_llm: str
    tensorrt: str
    gpu_sm: str
    tp: int
    pp: int
    limits: Limits
    model_hash: str
    scales_hash: str
    weights_hash: str

    @property
    def key(self) -> str:
        """Name of the engine in a cache."""
        return xxhash.xxh3_64_hexdigest(orjson.dumps(asdict(self)))

    @property
    def plan_key(self) -> str:
        """Name of an engine without weights in a cache: any weights with the same scales fit it."""
        return replace(self, weights_hash="").key


class BuildStep(Enum):
    """The work that it takes to have an engine."""

    NOTHING = "it is there"
    REFIT = "put the weights into a plan that is there"
    BUILD_AND_REFIT = "build a plan without weights, then put them in"
    BUILD = "build it"


def build_argv(checkpoint: Path, destination: Path, limits: Limits, workers: int) -> tuple[str, ...]:
    """Return the command line of `trtllm-build`."""
    switch = {True: "enable", False: "disable"}
    argv = (
        *("trtllm-build", "--checkpoint_dir", str(checkpoint), "--output_dir", str(destination)),
        *("--max_batch_size", str(limits.max_batch_size), "--max_num_tokens", str(limits.max_num_tokens)),
        *("--max_input_len", str(limits.max_input_len), "--max_seq_len", str(limits.max_seq_len)),
        *("--kv_cache_type", "paged", "--workers", str(workers)),
        *("--use_paged_context_fmha", switch[limits.use_paged_context_fmha]),
        *("--use_fp8_context_fmha", switch[limits.use_fp8_context_fmha]),
    )
    return (*argv, "--strip_plan") if limits.strip_plan else argv


def refit_argv(plan: Path, checkpoint: Path, destination: Path) -> tuple[str, ...]:
    """Return the command line of `trtllm-refit`, which puts a checkpoint's weights into an engine without weights."""
    return (
        *("trtllm-refit", "--engine_dir", str(plan), "--checkpoint_dir", str(checkpoint)),
        *("--output_dir", str(destination)),
    )


def wanted_record(checkpoint: Path, limits: Limits, runtime: Runtime) -> EngineRecord:
    """Describe the engine that a checkpoint and these limits give here; reads the whole checkpoint. ValueError when it
    is no TensorRT-LLM checkpoint, or the limits do not fit it."""
    found = read_json(checkpoint / CONFIG)
    if "mapping" not in found:
        command = shlex.join(["srlm", "convert", "SRC", os.path.abspath(checkpoint), "--to", "trtllm"])
        raise ValueError(f"{checkpoint} is no TensorRT-LLM checkpoint: {command} first")
    try:
        split, is_fp8 = read_split(found), found["quantization"].get("quant_algo") == "FP8"
        kind, positions = str(found["dtype"]), int(found["max_position_embeddings"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{checkpoint / CONFIG}: {type(error).__name__} {error}: convert the model again") from None
    if limits.use_fp8_context_fmha and not is_fp8:
        raise ValueError(f"use_fp8_context_fmha needs an FP8 checkpoint, and {checkpoint} is {kind}: turn it off")
    if limits.max_seq_len > positions:
        raise ValueError(f"max_seq_len {limits.max_seq_len} is more than the model's {positions} positions: lower it")
    model, scales, weights = (xxhash.xxh3_128() for _ in range(3))
    model.update(orjson.dumps(found, option=orjson.OPT_SORT_KEYS))
    for rank in range(split.tp * split.pp):
        path = checkpoint / rank_file(rank)
        with path.open("rb") as file:
            for name, tensor in sorted(read_header(path).items()):
                model.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
                file.seek(tensor.offset)
                # Scales apart from weights: other weights fit a plan, other scales do not.
                digest, left = (scales if name.endswith("scaling_factor") else weights), tensor.nbytes
                while left:
                    block = file.read(min(left, BLOCK_BYTES))
                    digest.update(block)
                    left -= len(block)
    return EngineRecord(
        **asdict(runtime),
        tp=split.tp,
        pp=split.pp,
        limits=limits,
        model_hash=model.hexdigest(),
        scales_hash=scales.hexdigest(),
        weights_hash=weights.hexdigest(),
    )


def next_step(wanted: EngineRecord, cache: Path) -> BuildStep:
    """Choose what to do for an engine in a cache. Scales are compiled into the kernels: with other ones, or another
    version, GPU, split or limit, an engine without weights is of no use."""
    if (cache / wanted.key / RECORD).is_file():
        return BuildStep.NOTHING
    if not wanted.limits.strip_plan:
        return BuildStep.BUILD
    return BuildStep.REFIT if (cache / wanted.plan_key / RECORD).is_file() else BuildStep.BUILD_AND_REFIT


def read_record(engine: Path) -> EngineRecord:
    """Read the record of an engine's folder. ValueError when it has none."""
    found: dict[str, Any] = read_json(engine / RECORD)
    try:
        return EngineRecord(**{**found, "limits": Limits(**found["limits"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{engine / RECORD} is no record of an engine ({error}): build it again") from None


def write_record(engine: Path, record: EngineRecord) -> None:
    """Write the record, which completes an engine's folder."""
    (engine / RECORD).write_bytes(pretty_json(asdict(record)))


def check_engine(engine: Path, runtime: Runtime, weights_hash: str | None, checkpoint: Path) -> EngineRecord:
    """Return the record of an engine that can be used here and, where `weights_hash` is given, has these weights.
    ValueError names what differs, and the command that builds the right one."""
    record = read_record(engine)
    here: Mapping[str, str] = asdict(runtime) | ({"weights_hash": weights_hash} if weights_hash else {})
    differing = [
        f"{item.name} {getattr(record, item.name)} there and {here[item.name]} here"
        for item in fields(EngineRecord)
        if item.name in here and getattr(record, item.name) != here[item.name]
    ]
    if differing:
        command = shlex.join(["srlm", "engine", "build", *map(os.path.abspath, (checkpoint, engine.parent))])
        raise ValueError(f"{engine} was built for something else: {', '.join(differing)}. Build it: {command}")
    return record


def probe_runtime(python: str) -> Runtime:
    """Ask the Python that has TensorRT-LLM for its versions and GPU. ValueError when it has no working TensorRT-LLM."""
    end = functools.partial(die_with, os.getpid())
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=False, preexec_fn=end)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(
            f"{python} has no working TensorRT-LLM ({last}): run this in its environment or container, on the GPU "
            "that will run the engine, or name that Python with --python"
        )
    return Runtime(**orjson.loads(done.stdout.strip().splitlines()[-1]))


def build_engine(
    checkpoint: Path, cache: Path, limits: Limits, runtime: Runtime, workers: int
) -> tuple[Path, BuildStep]:
    """Return the engine's folder in `cache` and what it took to have it. RuntimeError when a command fails."""
    wanted = wanted_record(checkpoint, limits, runtime)
    engine, plan = cache / wanted.key, cache / wanted.plan_key
    step = next_step(wanted, cache)
    match step:
        case BuildStep.NOTHING:
            pass
        case BuildStep.BUILD:
            _make(engine, wanted, build_argv(checkpoint, partial_folder(engine), limits, workers))
        case BuildStep.BUILD_AND_REFIT:
            _make(plan, wanted, build_argv(checkpoint, partial_folder(plan), limits, workers))
            _make(engine, wanted, refit_argv(plan, checkpoint, partial_folder(engine)))
        case BuildStep.REFIT:
            _make(engine, wanted, refit_argv(plan, checkpoint, partial_folder(engine)))
    return engine, step


def _make(folder: Path, record: EngineRecord, argv: Sequence[str]) -> None:
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    end = functools.partial(die_with, os.getpid())
    with subprocess.Popen(argv, start_new_session=True, preexec_fn=end) as process:
        try:
            code = process.wait()
        except BaseException:  # Ctrl-C: its workers, which would hold the GPU, end too
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if code != 0:
        raise RuntimeError(f"`{' '.join(argv)}` ended with code {code}: see its messages above")
    write_record(partial, record)
    give_name(partial, folder)
