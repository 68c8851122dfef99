"""`srlm bench conversion`: conversions of a synthetic checkpoint beside `cp` of the same bytes, in one run.

Every figure is of a process of its own: seconds until its files are on the disk (fsync), and the largest resident set
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
from pathlib import Path
from statistics import fmean, median

import numpy as np

from srlm_mega.checkpoints_conversion.bits import DType, from_float32
from srlm_mega.checkpoints_conversion.build import sync
from srlm_mega.checkpoints_conversion.folder import LLAMA_IDS
from srlm_mega.checkpoints_conversion.fp8 import Amax, Quantizer, Rounding, linear_names
from srlm_mega.checkpoints_conversion.huggingface_files import plan
from srlm_mega.checkpoints_conversion.llama import LlamaShape
from srlm_mega.errors import UserError
from srlm_mega.tools.bench_record import BenchRecord, BenchRow, make_record, make_row, write_record

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
from srlm_mega.checkpoints_conversion.megatron import load_shard, placements
source, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir()
weights = LlamaForCausalLM.from_pretrained(source, dtype="auto").state_dict()
shape = read_shape(source)
for rank, place in enumerate(placements(shape, int(sys.argv[3]), 1)):
    save_file(load_shard(weights, shape, place), out / f"rank{rank}.safetensors")
"""


def write_synthetic(folder: Path, shape: LlamaShape) -> int:
    """A bf16 model folder of random numbers, fast; returns its bytes."""
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
    """What a command took: seconds, and the largest resident set of any of its processes in MiB."""

    seconds: float
    peak_mib: int


def measure(argv: Sequence[str], destination: Path, sources: Sequence[Path], cold: bool) -> Taken:
    """What a command takes. What was at `destination` is removed first."""
    shutil.rmtree(destination, ignore_errors=True)
    for path in (file for folder in sources for file in folder.iterdir()):
        _set_cache(path, cold)
    started = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _peak_of_tree(process.pid))
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise RuntimeError(f"`{' '.join(argv)}` failed")
    if destination.is_dir():
        for path in destination.iterdir():
            sync(path)
    return Taken(time.perf_counter() - started, peak // 1024)


def _peak_of_tree(pid: int) -> int:
    """KiB: the largest resident set that any of these processes ever had (the system counts, polling misses nothing
    but the last moment of a process)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0
    own = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
    return max([own, *(_peak_of_tree(int(child)) for child in children)])


def _set_cache(path: Path, cold: bool) -> None:
    with path.open("rb") as file:
        if cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while file.read(1 << 24):
                pass


@dataclass(frozen=True)
class ConversionRequest:
    """What is measured; `cold`: with nothing of the source in memory, otherwise after it was read once."""

    jobs: int
    plain: bool
    cold: bool
    repetitions: int


def run_benchmark(
    folder: Path, model: str, layers: int | None, request: ConversionRequest, json_file: Path | None
) -> str:
    """All rows as a Markdown table. Needs three times the model's bytes on the disk, and removes what it wrote."""
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
    record = make_record("conversion", f"{_cpu()} ({os.cpu_count()} cores)", 1, settings, rows)
    if json_file is not None:
        write_record(record, json_file)
    return markdown(record)


def run(root: Path, shape: LlamaShape, request: ConversionRequest) -> tuple[list[BenchRow], int]:
    """A row for each conversion, and the bytes of the model. `times_cp`: its throughput over that of `cp` with the same
    cache, the median over the repetitions, in each of which all take turns."""
    source, num_bytes = root / "model", write_synthetic(root / "model", shape)
    srlm = [str(Path(sys.executable).parent / "srlm"), "convert"]
    out, trtllm = root / "out", root / "trtllm"
    jobs = ["--jobs", str(request.jobs)]
    split = ["--tp", str(TP), *jobs]
    fp8 = ["--fp8", "--calibration", str(root / "amax.json")]
    commands: list[tuple[str, list[str], Path, Path]] = [
        (CP[0], ["cp", "--reflink=never", "-r", str(source), str(out)], out, source),
        ("to trtllm TP8", [*srlm, str(source), str(trtllm), "--to", "trtllm", *split], trtllm, source),
        ("trtllm TP8 back", [*srlm, str(trtllm), str(out), "--to", "huggingface", *jobs], out, trtllm),
        ("to megatron TP8", [*srlm, str(source), str(out), "--to", "megatron", *split], out, source),
        ("to trtllm TP8 FP8", [*srlm, str(source), str(out), "--to", "trtllm", *fp8, *split], out, source),
        ("verify", [*srlm, "verify", str(source), str(trtllm)], root / "none", trtllm),
        (CP[1], ["cp", "--reflink=never", "-r", str(source), str(out)], out, source),
    ]
    if request.plain:
        argv = [sys.executable, "-c", PLAIN, str(source), str(out), str(TP)]
        commands.append(("transformers, load all, save Megatron's shards", argv, out, source))
    taken: dict[str, list[Taken]] = {what: [] for what, *_ in commands}
    for _ in range(request.repetitions):
        for what, argv, destination, reads in commands:
            taken[what].append(measure(argv, destination, [reads], request.cold))
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
    """GB of bf16 per second that one core casts to e4m3, five times, by the time of this process."""
    block = from_float32(np.random.default_rng(0).standard_normal(1 << 23, dtype=np.float32), DType.BFLOAT16)
    speeds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        Quantizer(Rounding.DIRECT)(block, DType.BFLOAT16, 0.01)
        speeds.append(block.nbytes / 1e9 / (resource.getrusage(resource.RUSAGE_SELF).ru_utime - before))
    return speeds


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def markdown(record: BenchRecord) -> str:
    """The table of one run."""
    settings = record.settings
    lines = [
        f"{settings['model']}, {settings['layers']} layers, {settings['num_bytes'] / 1e9:.2f} GB, "
        f"--jobs {settings['jobs']}, medians of {settings['repetitions']}; "
        f"{record.device}, load {record.load_average[0]:.1f}; {record.date}; "
        f"FP8 cast {max(record.row('FP8 cast of one core').samples):.2f} GB/s on one core",
        "",
        "| what | cache | seconds | GB/s | times cp | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in record.rows:
        if row.unit == "s":
            speed, times, peak = (row.extra[key] or 0.0 for key in ("gb_per_second", "times_cp", "peak_rss_mib"))
            cells = (row.name, row.labels["cache"], f"{row.median:.1f}", f"{speed:.2f}", f"{times:.2f}")
            lines.append(f"| {' | '.join(cells)} | {peak:.0f} |")
    return "\n".join(lines) + "\n"
