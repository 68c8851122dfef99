"""`srlm bench device`, its first part: this machine, what `srlm doctor` says of it, and how fast its GPU multiplies and
copies, which is what every other figure is compared with."""

import os
import platform
import shutil
import subprocess
import sysconfig
from functools import partial
from pathlib import Path
from typing import Annotated

import orjson
import torch
import typer

from srlm_mega.config.model_sizes import GIB
from srlm_mega.launch.child_process import die_with, srlm_command
from srlm_mega.tools.bench_kernels import find_device, interleaved
from srlm_mega.tools.bench_record import BenchRow, make_record, make_row, table, write_record
from srlm_mega.tools.device.first_call import gpu_name

PACKAGES = ("triton", "liger-kernel", "trl", "transformer-engine", "flash-attn", "accelerate", "datasets")
DOCTOR_SECONDS = 25  # of each probe
MEMORY = "GPU memory"


def main(
    json: Annotated[Path, typer.Option(help="The record to write.")],
    doctor: Annotated[bool, typer.Option(help="Also ask `srlm doctor`.")] = True,
) -> None:
    """Describe this machine, and measure a matrix product and a copy."""
    device = find_device()
    rows = [make_row(MEMORY, "GiB", [torch.cuda.get_device_properties(device).total_memory / GIB], "neither")
            ] if device.type == "cuda" else []  # fmt: skip
    rows += speeds(device)
    settings = facts() | (asked_doctor() if doctor else {})
    record = make_record("device environment", settings, rows, PACKAGES, gpu_name(device))
    write_record(record, json)
    print(table(record))


def facts() -> dict[str, object]:
    """Return what kernels are built with, and what the driver and torch say."""
    return {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "gcc": said("gcc", "--version"),
        "python_headers": Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
        "nvidia_smi": said("nvidia-smi"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "sdpa": {
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        },
    }


def asked_doctor() -> dict[str, object]:
    """Return the doctor's exit code, and its rows or what it says instead."""
    argv = [*srlm_command(), "doctor", "--json", "--timeout", str(DOCTOR_SECONDS)]
    done = subprocess.run(argv, capture_output=True, check=False, preexec_fn=partial(die_with, os.getpid()))
    rows = orjson.loads(done.stdout) if done.stdout.startswith(b"{") else done.stderr.decode()
    return {"doctor_exit_code": done.returncode, "doctor": rows}


def said(*command: str) -> str | None:
    """Return what a command prints; None where it is absent."""
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def speeds(device: torch.device) -> list[BenchRow]:
    """Measure a bf16 product of square matrices and a copy of 1 GiB; on a CPU tiny ones, whose figures mean nothing."""
    size, count = (8192, 2**30) if device.type == "cuda" else (64, 2**16)
    left = torch.randn(size, size, device=device).to(torch.bfloat16)
    source = torch.empty(count, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    calls = {"product": partial(torch.mm, left, left), "copy": partial(target.copy_, source)}
    taken = interleaved(calls, device, 10)
    product, copy = ([sample.milliseconds for sample in taken[name]] for name in calls)
    return [
        make_row("bf16 product", "TFLOP/s", [2 * size**3 / one / 1e9 for one in product], "higher"),
        make_row("copy, read and written", "GB/s", [2 * count / one / 1e6 for one in copy], "higher"),
    ]


if __name__ == "__main__":
    typer.run(main)
