"""`srlm bench conversion`: conversions of a synthetic checkpoint, compared with `cp` of the same bytes in one run.

Every figure is of a command of its own: seconds until its files are on the disk (fsync), and the largest resident set
of any of its processes.
"""

import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median

import numpy as np

from srlm_mega.checkpoints_conversion.bits import DType, from_float32
from srlm_mega.checkpoints_conversion.build import sync
from srlm_mega.checkpoints_conversion.fp8 import Amax, Quantizer, Rounding, linear_names
from srlm_mega.checkpoints_conversion.huggingface_files import LLAMA_IDS, plan
from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.errors import UserError
from srlm_mega.launch.child_process import die_with, srlm_command
from srlm_mega.tools.bench_record import BenchRecord, BenchRow, make_record, make_row, markdown, write_record
from srlm_mega.tools.bench_timing import take_turns

SHAPES = {
    "tiny": LlamaShape(4, 512, 1376, 8, 8, 4000, 2048, 1e-5, 10000.0),
    "llama2_7b": LlamaShape(32, 4096, 11008, 32, 32, 32000, 4096, 1e-5, 10000.0),
}
TP = 8
CP = ("cp", "cp again")  # first and last, so that both ends of a run are seen
POLL_SECONDS = 0.02
BLOCK_NUMBERS = 1 << 25
PLAIN = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from transformers import LlamaForCausalLM
from srlm_mega.checkpoints_conversion.huggingface import read_shape
from srlm_mega.checkpoints_conversion.megatron import load_shard
from srlm_mega.checkpoints_conversion.placement import placements
source, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir()
weights = LlamaForCausalLM.from_pretrained(source, dtype="auto").state_dict()
shape = read_shape(source)
for rank, place in enumerate(placements(shape, int(sys.argv[3]), 1)):
    save_file(load_shard(weights, shape, place), out / f"rank{rank}.safetensors")
"""


def write_synthetic(folder: Path, shape: LlamaShape) -> int:
    """Write a bf16 model folder of random numbers quickly, with an amax.json next to it; returns the model's bytes."""
    folder.mkdir(parents=True)
    made = plan(shape, shape.to_huggingface() | LLAMA_IDS, DType.BFLOAT16)
    numbers = np.random.default_rng(0).standard_normal(BLOCK_NUMBERS, dtype=np.float32) * np.float32(0.02)
    block = from_float32(numbers, DType.BFLOAT16)
    for output in made.outputs:
        with (folder / output.name).open("wb") as file:
            for offset, content in output.constants:
                os.pwrite(file.fileno(), content, offset)
            for stored in (stored for stored in made.stored if stored.file == output.name):
                file.seek(stored.offset)
                left = stored.nbytes // 2
                while left:
                    part = block[: min(left, BLOCK_NUMBERS)]
                    file.write(part.data)
                    left -= len(part)
    for name, content in made.texts.items():
        (folder / name).write_bytes(content)
    Amax(1, dict.fromkeys(linear_names(shape), 4.0)).save(folder.with_name("amax.json"))
    return made.num_bytes


@dataclass(frozen=True)
class Taken:
    """Seconds of a command, and the largest resident set of any of its processes in MiB."""

    seconds: float
    peak_mib: int


def measure(argv: Sequence[str], destination: Path, source: Path, cold: bool) -> Taken:
    """Run a command and return its cost. `destination` is removed first, and synced to the disk within the seconds."""
    shutil.rmtree(destination, ignore_errors=True)
    for path in source.iterdir():
        _set_cache(path, cold)
    started = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, preexec_fn=partial(die_with, os.getpid()))
    peak = 0
    while process.poll() is None:
        peak = max(peak, _peak_of_tree(process.pid))
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise RuntimeError(f"`{' '.join(argv)}` failed")
    if destination.is_dir():
        for path in destination.rglob("*"):
            sync(path)
    return Taken(time.perf_counter() - started, peak // 1024)


def _peak_of_tree(pid: int) -> int:
    """Return the largest resident set in KiB that any process of a tree ever had. The kernel keeps the maximum, so that
    polling misses the last moment of a process only."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0
    own = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
    return max([own, *(_peak_of_tree(int(child)) for child in children)])


def _set_cache(path: Path, cold: bool) -> None:
    """Drop a file from the page cache, or read it into it."""
    with path.open("rb") as file:
        if cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while file.read(1 << 24):
                pass


@dataclass(frozen=True)
class ConversionRequest:
    """The options of the command. `cold`: with nothing of the source in the page cache, otherwise all of it."""

    jobs: int
    plain: bool
    cold: bool
    repetitions: int


def run_benchmark(
    folder: Path, model: str, layers: int | None, request: ConversionRequest, json_file: Path | None
) -> str:
    """Measure, write the record, and return it as a Markdown table. Needs three times the model's bytes on the disk,
    and removes what it wrote. UserError for an unknown model."""
    if model not in SHAPES:
        raise UserError(f"--model {model!r} is not one of {', '.join(SHAPES)}")
    shape = SHAPES[model] if layers is None else replace(SHAPES[model], num_layers=layers)
    root = folder / "bench_conversion"
    shutil.rmtree(root, ignore_errors=True)
    try:
        rows, num_bytes = run(root, shape, request)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    settings = asdict(request) | {"model": model, "layers": shape.num_layers, "num_bytes": num_bytes}
    rows.append(make_row("FP8 cast of one core", "GB/s", cast_speeds(), "higher"))
    record = make_record("conversion", settings, rows, device=f"{_cpu()} ({os.cpu_count()} cores)")
    write_record(record, json_file)
    return as_text(record)


def run(root: Path, shape: LlamaShape, request: ConversionRequest) -> tuple[list[BenchRow], int]:
    """Return a row for each conversion, and the bytes of the model. `times_cp`: its throughput over that of `cp` with
    the same cache, the median over the repetitions, in each of which all take turns."""
    source, num_bytes = root / "model", write_synthetic(root / "model", shape)
    srlm = [*srlm_command(), "convert"]
    out, trtllm, nothing = root / "out", root / "trtllm", root / "none"
    copy = ["cp", "--reflink=never", "-r", str(source), str(out)]
    jobs = ["--jobs", str(request.jobs)]
    split = ["--tp", str(TP), *jobs]
    fp8 = ["--fp8", "--calibration", str(root / "amax.json")]
    commands: dict[str, tuple[list[str], Path, Path]] = {  # name: command, what it writes, what it reads
        CP[0]: (copy, out, source),
        "to trtllm TP8": ([*srlm, str(source), str(trtllm), "--to", "trtllm", *split], trtllm, source),
        "trtllm TP8 back": ([*srlm, str(trtllm), str(out), "--to", "huggingface", *jobs], out, trtllm),
        "to megatron TP8": ([*srlm, str(source), str(out), "--to", "megatron", *split], out, source),
        "to trtllm TP8 FP8": ([*srlm, str(source), str(out), "--to", "trtllm", *fp8, *split], out, source),
        "verify": ([*srlm, "verify", str(source), str(trtllm)], nothing, trtllm),
        CP[1]: (copy, out, source),
    }
    if request.plain:
        argv = [sys.executable, "-c", PLAIN, str(source), str(out), str(TP)]
        commands["transformers, load all, save Megatron's shards"] = (argv, out, source)
    calls = {name: partial(measure, *command, request.cold) for name, command in commands.items()}
    taken = take_turns(calls, request.repetitions)
    copied = [fmean(1 / one.seconds for one in both) for both in zip(*(taken[what] for what in CP), strict=True)]
    rows = []
    for what, measured in taken.items():
        seconds = [one.seconds for one in measured]
        extra = {
            "gb_per_second": num_bytes / 1e9 / median(seconds),
            "times_cp": median(1 / one / copies for one, copies in zip(seconds, copied, strict=True)),
            "peak_rss_mib": float(max(one.peak_mib for one in measured)),
        }
        rows.append(make_row(what, "s", seconds, labels={"cache": "cold" if request.cold else "warm"}, extra=extra))
    return rows, num_bytes


def cast_speeds() -> list[float]:
    """Return the GB of bf16 per second that one core casts to e4m3, five times, by the CPU time of this process."""
    block = from_float32(np.random.default_rng(0).standard_normal(1 << 23, dtype=np.float32), DType.BFLOAT16)
    speeds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        Quantizer(Rounding.DIRECT)(block, DType.BFLOAT16, 0.01)
        speeds.append(block.nbytes / 1e9 / (resource.getrusage(resource.RUSAGE_SELF).ru_utime - before))
    return speeds


def _cpu() -> str:
    """Return the name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def as_text(record: BenchRecord) -> str:
    """Return the record as a Markdown table under a line of settings."""
    settings = record.settings
    rows = [("what", "cache", "seconds", "GB/s", "times cp", "peak MiB")]
    for row in record.rows:
        if row.unit == "s":
            speed, times, peak = (row.extra[key] or 0.0 for key in ("gb_per_second", "times_cp", "peak_rss_mib"))
            figures = (f"{row.median:.1f}", f"{speed:.2f}", f"{times:.2f}", f"{peak:.0f}")
            rows.append((row.name, row.labels["cache"], *figures))
    return (
        f"{settings['model']}, {settings['layers']} layers, {settings['num_bytes'] / 1e9:.2f} GB, "
        f"--jobs {settings['jobs']}, medians of {settings['repetitions']}; "
        f"{record.device}, load {record.load_average[0]:.1f}; {record.date}; "
        f"FP8 cast {max(record.row('FP8 cast of one core').samples):.2f} GB/s on one core\n\n{markdown(rows)}\n"
    )
